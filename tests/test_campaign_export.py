import csv
import io
import json
import sys
from hashlib import sha256

import pytest
import yaml

from aletheia_lora.campaign import export as export_room
from aletheia_lora.campaign.export import (
    COMPARED,
    COMPARED_COLUMNS,
    MEAN_COLUMNS,
    RUN_COLUMNS,
    SUMMARIES,
    _margins,
    _spec,
    export,
)
from aletheia_lora.campaign.records import CellFolder, DamagedError
from aletheia_lora.campaign.runner import pin
from aletheia_lora.campaign.spec import cells
from aletheia_lora.cli import main
from aletheia_lora.errors import ConfigError, OutputError, PrivacyError
from aletheia_lora.files import write_json
from aletheia_lora.report.campaign_plots import draw_campaign
from campaign_results import SETTINGS

CANARY = "Canary7Bird"
FOLDER = f"/srv/{CANARY}/secret"
ENVIRONMENT = {"python": "3.13.1", "torch": "2.13.0", "device": "CPU, 2 cores", "threads": "1"}
TOKENS = {
    "hub": "hf_" + "AbCdEfGhIjKlMnOpQrSt",
    "openai": "sk-" + "abcdefghijklmnop1234",
    "github": "gh" + "p_0123456789abcdefghij0123",
    "aws": "AKIA" + "ABCDEFGHIJKLMNOP",
    "header": "Bearer " + "abcdefghijkl",
    "remote": "https://alice:" + "pw@example.org/x.git",
}


@pytest.fixture(autouse=True)
def drawn(monkeypatch):
    """What figures are drawn from; they are not drawn, for that takes a while."""
    seen = []

    def stand_in(record):
        seen.append(record)
        return {}

    monkeypatch.setattr(export_room, "draw_campaign", stand_in)
    return seen


def spec(**changed):
    """A resolved spec of one model, one task, two methods and two seeds."""
    method = {"adapter": "lora", "draws": 1, "allocation": "uniform"}
    return {
        "name": "small",
        "models": [{"name": "tiny", "model": "org/tiny", "dtype": "auto", "digest": None}],
        "tasks": [{"name": "words", "data": "rows.jsonl", "max_length": 64, "digest": "0" * 64}],
        "methods": [{"name": "last", "strategy": "last", **method}, {"name": "uniform", "strategy": "all", **method}],
        "seeds": [0, 1],
        "steps": 4,
        "margins": {"heldout_loss": 0.01, "other_loss": None},
        "versions": {"aletheia-lora": "1", "torch": "2.13.0"},
        **SETTINGS,
        **changed,
    }


def result(loss=2.0, **changed):
    return {
        "layers": [2, 3],
        "learning_rate": 1e-3,
        "grid": [],
        "steps": 4,
        "micro_batches": 1,
        "trainable_params": 512,
        "lowest_backward_layer": 2,
        "base_heldout_loss": 3.0,
        "heldout_loss": loss,
        "step_seconds": [0.5, 0.25, 0.25, 0.25],
        "probe_seconds": 0.5,
        "seconds": 4.0,
        "rows_digest": "1" * 64,
        "fingerprint": "llama-4",
        "environment": ENVIRONMENT,
        **changed,
    }


def campaign(folder, made, outcome=lambda number: ("done", None, result(2.0 + number))):
    """A campaign's folder with a record for every cell but those whose outcome is None."""
    write_json(folder / "campaign.json", made)
    places = [CellFolder.of(folder, cell) for cell in cells(made)]
    for number, place in enumerate(places):
        if outcome(number) is not None:
            state, reason, values = outcome(number)
            place.make()
            with place.lock():
                place.append("attempt_started", pid=1, environment=ENVIRONMENT)
                place.finish(state, reason, **values)
    return places


def rows_of(file):
    return list(csv.DictReader(io.StringIO(file.read_text())))


def everything(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


# --- what is in it ----------------------------------------------------------------------------------------------


def test_a_bundle_names_the_evaluation_and_its_margins_but_not_its_folder():
    asked = {"tasks": ["gsm8k"], "limit": 5, "data_dir": FOLDER, "digests": {}}
    assert _spec(spec())["evaluation"] is None
    assert _spec({**spec(), "evaluation": asked})["evaluation"] == {"tasks": ["gsm8k"], "limit": 5}
    assert _margins({"margins": {"heldout_loss": 0.01, "gsm8k": 2.0}, "evaluation": asked})["gsm8k"] == 2.0


def test_a_bundle_says_how_many_processes_trained_and_what_packed_the_base(tmp_path):
    packed = {"processes": 2, "packed_versions": {"bitsandbytes": "0.50.0", CANARY: FOLDER}}
    for name, more in (("plain", {}), ("packed", packed)):
        campaign(tmp_path / name, spec(**more))
        export(tmp_path / name, tmp_path / f"{name}-bundle")
    plain, found = (
        json.loads((tmp_path / f"{name}-bundle" / "summary.json").read_text()) for name in ("plain", "packed")
    )
    assert found["spec"] == {**plain["spec"], "processes": 2} and "processes" not in plain["spec"]
    assert found["versions"] == {**plain["versions"], "bitsandbytes": "0.50.0"}


def test_a_bundle_says_which_margins_were_changed_after_how_many_cells(tmp_path, drawn):
    campaign(tmp_path / "small", spec())
    made = spec(margins={"heldout_loss": 0.5, "other_loss": None}, tasks=[{"name": "words", "data": f"{CANARY}.jsonl"}])
    pin(made, tmp_path / "small", accept_change=True)
    export(tmp_path / "small", tmp_path / "bundle")
    (change,) = json.loads((tmp_path / "bundle" / "summary.json").read_text())["accepted_changes"]
    assert (change["num_cells"], change["margins"]) == (4, ["margins.heldout_loss: 0.01 -> 0.5"])
    assert change["num_other_changes"] == 3  # data, length and digest of the task
    check_no_canary(tmp_path / "bundle", drawn)


def test_a_bundle_has_a_line_for_every_run_and_means_with_their_gaps(tmp_path):
    outcomes = [("done", None, result(2.0)), ("failed", "ValueError: no", {}), ("done", None, result(4.0)), None]
    places = campaign(tmp_path / "small", spec(), lambda number: outcomes[number])
    digests = export(tmp_path / "small", tmp_path / "bundle")
    runs = rows_of(tmp_path / "bundle" / "aggregate_runs.csv")
    assert [run["state"] for run in runs] == ["done", "failed", "done", "planned"]
    assert list(runs[0]) == list(RUN_COLUMNS)
    assert (runs[0]["layers"], runs[0]["heldout_loss"], runs[0]["median_step_seconds"]) == ("2 3", "2.0", "0.25")
    assert (runs[1]["reason"], runs[1]["heldout_loss"], runs[3]["attempts"]) == ("ValueError", "", "")
    assert runs[0]["cell"] == places[0].cell.digest[:12]
    for name, keys in SUMMARIES.items():
        last, uniform = rows_of(tmp_path / "bundle" / name)
        assert list(last) == [*keys, *MEAN_COLUMNS]
        assert (last["n"], last["of"], last["mean_heldout_loss"], last["gaps"]) == ("2", "2", "3.0", "")
        assert (uniform["n"], uniform["mean_heldout_loss"]) == ("0", "")
        assert uniform["gaps"] == "1 failed, 1 planned"
    summary = json.loads((tmp_path / "bundle" / "summary.json").read_text())
    assert summary["states"] == {"run": {"done": 2, "failed": 1, "planned": 1}}
    assert summary["margins"] == {"heldout_loss": 0.01, "other_loss": None}
    assert [mean["n"] for mean in summary["means"]] == [2, 0]
    assert summary["environments"] == [ENVIRONMENT] and runs[0]["environment"] == "0"
    assert summary["spec"]["models"] == [{"name": "tiny", "dtype": "auto", "digest": None, "source": "org/tiny"}]
    assert summary["spec"]["tasks"][0]["source"] == "local"
    assert summary["versions"]["torch"] == "2.13.0" and summary["versions"]["trl"] is None
    files = everything(tmp_path / "bundle")
    assert set(files) == {*summary["files"], "summary.json"}
    assert {name: sha256(files[name]).hexdigest() for name in digests} == digests == summary["files"]
    compared, changed = (rows_of(tmp_path / "bundle" / name) for name in COMPARED)
    assert [list(rows[0]) for rows in (compared, changed)] == [list(columns) for _, columns, _ in COMPARED.values()]
    assert (compared[0]["method"], compared[0]["reference"], compared[0]["n"], compared[0]["of"]) == (
        "last",
        "uniform",
        "0",
        "2",
    )
    assert (changed[0]["method"], changed[0]["n"], changed[0]["of"]) == ("last", "2", "2")
    readme = files["README.md"].decode()
    assert all(f"- `{column}`: " in readme for column in {**RUN_COLUMNS, **MEAN_COLUMNS, **COMPARED_COLUMNS})


def test_the_same_records_make_the_same_bundle(tmp_path):
    campaign(tmp_path / "small", spec())
    for name in ("once", "again"):
        export(tmp_path / "small", tmp_path / name)
    assert everything(tmp_path / "once") == everything(tmp_path / "again")


def test_cells_of_every_kind_are_counted(tmp_path):
    def outcome(number):
        return ("done", None, result(validation_loss=1.0 + number)) if number != 1 else None

    campaign(tmp_path / "small", spec(learning_rates=[1e-3, 1e-2], methods=spec()["methods"][:1]), outcome)
    export(tmp_path / "small", tmp_path / "bundle")
    summary = json.loads((tmp_path / "bundle" / "summary.json").read_text())
    assert summary["states"] == {"run": {"invalid": 2}, "grid": {"done": 1, "planned": 1}}
    reasons = {run["reason"] for run in rows_of(tmp_path / "bundle" / "aggregate_runs.csv")}
    assert reasons == {"its grid of learning rates gives no rate now"}


def test_an_evaluation_of_a_run_that_is_no_result_counts_as_none(tmp_path):
    made = spec(methods=spec()["methods"][:1], seeds=[0], evaluation={"tasks": ["quiz"]})
    outcomes = [("failed", "ValueError: no", {}), ("done", None, {"evaluation": {}})]
    campaign(tmp_path / "small", made, lambda number: outcomes[number])
    export(tmp_path / "small", tmp_path / "bundle")
    summary = json.loads((tmp_path / "bundle" / "summary.json").read_text())
    assert summary["states"] == {"run": {"failed": 1}, "evaluation": {"invalid": 1}}


def test_the_figures_of_the_report_are_in_it(tmp_path, monkeypatch):
    monkeypatch.setattr(export_room, "draw_campaign", draw_campaign)
    campaign(tmp_path / "small", spec())
    export(tmp_path / "small", tmp_path / "bundle")
    files = everything(tmp_path / "bundle")
    pictures = {name for name, content in files.items() if content.startswith(b"\x89PNG")}
    assert "speedup.png" in pictures and pictures < set(json.loads(files["summary.json"])["files"])
    assert all(f"- `{name}`" in files["README.md"].decode() for name in pictures)


def test_a_key_is_not_drawn_either(tmp_path, drawn):
    methods = [{"name": TOKENS["github"], "strategy": "last", "adapter": "lora", "draws": 1}]
    campaign(tmp_path / "small", spec(methods=methods))
    refused(tmp_path, "figures, line [0-9]+: what looks like a key")
    assert drawn == []


def test_a_campaign_without_runs_has_tables_without_rows(tmp_path):
    methods = [{"name": "dora", "strategy": "all", "adapter": "dora", "draws": 1}]
    campaign(tmp_path / "small", spec(methods=methods, match=["time"]))
    export(tmp_path / "small", tmp_path / "bundle")
    assert (tmp_path / "bundle" / "aggregate_runs.csv").read_text() == ",".join(RUN_COLUMNS) + "\n"


# --- what stays behind ------------------------------------------------------------------------------------------

CARRIERS = {
    "environment": {"environment": {**ENVIRONMENT, "hostname": CANARY, "git": TOKENS["remote"], "env": {"X": FOLDER}}},
    "environment of another kind": {"environment": {CANARY: [FOLDER]}},
    "log lines": {"log": [f"loading {FOLDER}"], "train_text": CANARY},
    "other results": {"prefix_cache": {"folder": FOLDER}, "checks": {CANARY: True}, "heldout": [{"text": CANARY}]},
}
SPECS = {
    "model path": {"models": [{"name": "tiny", "model": f"{FOLDER}/tiny", "digest": None}]},
    "relative model path": {"models": [{"name": "tiny", "model": f"{CANARY}/tiny", "digest": "0" * 64}]},
    "data path": {"tasks": [{"name": "words", "data": f"{FOLDER}/rows.jsonl", "digest": "0" * 64}]},
    "relative data path": {"tasks": [{"name": "words", "data": f"{CANARY}/rows.jsonl", "digest": None}]},
    "relative path of weights": {"models": [{"name": "tiny", "model": f"models/{CANARY}.GGUF", "digest": None}]},
    "path of the other text": {"other_text": {"name": "wiki", "data": f"../{CANARY}/rows.jsonl", "digest": None}},
    "more keys": {"git": TOKENS["remote"], "HOME": FOLDER, "user": CANARY},
    "more keys of a method": {
        "methods": [{"name": "last", "strategy": "last", "adapter": "lora", "draws": 1, "by": CANARY}]
    },
    "more keys of the versions": {"versions": {"torch": "2.13.0", CANARY: FOLDER}},
    "more margins": {"margins": {"heldout_loss": 0.01, CANARY: FOLDER}},
}


def check_no_canary(folder, drawn):
    for name, content in {**everything(folder), "figures": json.dumps(drawn).encode()}.items():
        for canary in (CANARY, *TOKENS.values()):
            assert canary.lower() not in content.decode().lower(), name


@pytest.mark.parametrize("where", CARRIERS)
def test_what_a_record_holds_beside_the_columns_stays_behind(tmp_path, drawn, where):
    campaign(tmp_path / "small", spec(), lambda number: ("done", None, result(**CARRIERS[where])))
    export(tmp_path / "small", tmp_path / "bundle")
    check_no_canary(tmp_path / "bundle", drawn)


@pytest.mark.parametrize("where", SPECS)
def test_what_the_spec_holds_beside_the_keys_stays_behind(tmp_path, drawn, where):
    campaign(tmp_path / "small", spec(**SPECS[where]))
    export(tmp_path / "small", tmp_path / "bundle")
    check_no_canary(tmp_path / "bundle", drawn)


def test_logs_events_lines_of_progress_and_what_cells_share_stay_behind(tmp_path, drawn):
    for place in campaign(tmp_path / "small", spec()):
        (place.path / "log.txt").write_text(f"{FOLDER} {TOKENS['hub']}")
        with place.lock():
            place.append("progress", line=f"reading {FOLDER} on {CANARY}")
    (tmp_path / "small" / "shared").mkdir()
    (tmp_path / "small" / "shared" / "base.json").write_text(json.dumps({"text": CANARY}))
    export(tmp_path / "small", tmp_path / "bundle")
    check_no_canary(tmp_path / "bundle", drawn)


@pytest.mark.parametrize(
    ("reason", "told"),
    [
        (f"OSError: cannot read '{FOLDER}/a b.json': gone", "OSError"),
        (f"DataError: row 3 is '{CANARY} has a fever'", "DataError"),
        (f"OutOfMemoryError: on {CANARY}.cluster", "OutOfMemoryError"),
        (f"{CANARY}Error: no", "another reason"),
        (f"no room for {CANARY}", "another reason"),
        (f"checks that do not hold: steps, rows, {CANARY}", "checks that do not hold: steps, rows"),
        (f"no record from the process (exit code 1): {CANARY}", "no record from the process (exit code 1)"),
        (f"no learning rate of the grid ended well; the first: {CANARY}", "no learning rate of the grid ended well"),
        ("out of memory with 2 rows at a time", "out of memory with 2 rows at a time"),
        *((f"ValueError: {token}", "ValueError") for token in TOKENS.values()),
    ],
)
def test_of_an_error_only_its_class_is_told_and_of_our_own_words_what_is_fixed(tmp_path, drawn, reason, told):
    campaign(tmp_path / "small", spec(), lambda number: ("failed", reason, {}))
    export(tmp_path / "small", tmp_path / "bundle")
    assert {run["reason"] for run in rows_of(tmp_path / "bundle" / "aggregate_runs.csv")} == {told}
    check_no_canary(tmp_path / "bundle", drawn)


# --- what is refused --------------------------------------------------------------------------------------------


def refused(tmp_path, message):
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(PrivacyError, match=message) as error:
        export(tmp_path / "small", tmp_path / "bundle")
    assert {path.name for path in tmp_path.iterdir()} == before  # nothing, and nothing half-written
    return str(error.value)


@pytest.mark.parametrize("token", TOKENS)
def test_a_key_is_refused_and_not_repeated(tmp_path, token):
    device = {"environment": {"device": TOKENS[token]}}
    campaign(tmp_path / "small", spec(), lambda number: ("done", None, result(**device)))
    assert TOKENS[token] not in refused(tmp_path, "summary.json, line [0-9]+: what looks like a key")


def test_the_value_of_a_secret_variable_is_refused_and_not_repeated(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_DB_PASSWORD", "open sesame")
    device = {"environment": {"device": "open sesame"}}
    campaign(tmp_path / "small", spec(), lambda number: ("done", None, result(**device)))
    assert "sesame" not in refused(tmp_path, "summary.json: the value of the environment variable MY_DB_PASSWORD")


@pytest.mark.parametrize("key", ["name", "split", "prompt_column"])
@pytest.mark.parametrize("text", [FOLDER, "~/rows", TOKENS["hub"]])
def test_a_path_or_key_in_an_allowed_key_of_the_spec_is_refused(tmp_path, key, text):
    campaign(tmp_path / "small", spec(tasks=[{"name": "words", "data": "rows.jsonl", key: text}]))
    refused(tmp_path, "the path|looks like a key")


@pytest.mark.parametrize("where", ["method", "device", "campaign"])
@pytest.mark.parametrize("who", ["user", "host", "home", "folder"])
def test_a_name_or_folder_of_this_machine_is_refused_wherever_it_comes_in(tmp_path, monkeypatch, where, who):
    monkeypatch.setattr("getpass.getuser", lambda: "zaphod")
    monkeypatch.setattr("platform.node", lambda: "heart9.example.org")
    monkeypatch.setenv("HOME", "/srv/people/zb")
    text = {"user": "by-Zaphod", "host": "heart9", "home": "/srv/people/zb/x", "folder": str(tmp_path / "small")}[who]
    changed = {}
    if where == "method":
        changed = {"methods": [{"name": text, "strategy": "last", "adapter": "lora", "draws": 1}]}
    elif where == "campaign":
        changed = {"name": text}
    device = {"environment": {"device": text}} if where == "device" else {}
    campaign(tmp_path / "small", spec(**changed), lambda number: ("done", None, result(**device)))
    refused(tmp_path, "the path|the name")


def test_the_machine_of_the_last_driver_is_not_named_either(tmp_path):
    device = {"environment": {"device": "GPU of node9.cluster"}}
    campaign(tmp_path / "small", spec(), lambda number: ("done", None, result(**device)))
    write_json(tmp_path / "small" / "driver.lock", {"pid": 1, "host": "node9", "since": "today"})
    refused(tmp_path, "the name 'node9'")


# --- what can go wrong ------------------------------------------------------------------------------------------


def test_a_folder_that_holds_something_is_left_alone(tmp_path):
    campaign(tmp_path / "small", spec())
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "mine").write_text("x")
    with pytest.raises(OutputError, match="is not an empty folder"):
        export(tmp_path / "small", tmp_path / "bundle")
    assert everything(tmp_path / "bundle") == {"mine": b"x"}


def test_without_a_campaign_or_with_a_damaged_record_there_is_no_bundle(tmp_path):
    with pytest.raises(ConfigError, match="there is no campaign"):
        export(tmp_path / "small", tmp_path / "bundle")
    place = campaign(tmp_path / "small", spec())[0]
    record = json.loads((place.path / "record.json").read_text())
    (place.path / "record.json").write_text(json.dumps({**record, "attempts": 9}))
    with pytest.raises(DamagedError):
        export(tmp_path / "small", tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_the_command_writes_the_bundle_beside_the_campaign(tmp_path, monkeypatch, capsys):
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump({"name": "small"}))
    campaign(tmp_path / "small", spec())
    monkeypatch.setattr(sys, "argv", ["aletheia", "campaign", "export", str(tmp_path / "spec.yaml"), "--json"])
    main()
    printed = json.loads(capsys.readouterr().out)
    assert printed["bundle"] == str(tmp_path / "small-evidence")
    assert set(everything(tmp_path / "small-evidence")) == {*printed["files"], "summary.json"}
    monkeypatch.setattr(sys, "argv", [*sys.argv[:-1], "--bundle", str(tmp_path / "other")])
    main()
    assert f"wrote {tmp_path / 'other'}" in capsys.readouterr().out
