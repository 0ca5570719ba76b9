import os
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

import campaign_child as child
from aletheia_lora.campaign.commands import shown_live
from aletheia_lora.campaign.executors import local_executor
from aletheia_lora.campaign.outcomes import outcomes
from aletheia_lora.campaign.records import CellFolder, LockedError, accepted_changes, chosen_rate, trained_run
from aletheia_lora.campaign.report import campaign_record, csv_text, report_text, shown, tables, write_report
from aletheia_lora.campaign.runner import Budget, driver_lock, driver_workers, pin, run_campaign
from aletheia_lora.campaign.spec import cells
from aletheia_lora.campaign.status import status, status_text
from aletheia_lora.errors import AletheiaError, ConfigError, OutputError
from aletheia_lora.files import write_json
from aletheia_lora.report.campaign_page import render_campaign
from campaign_results import SETTINGS

BUDGET = Budget(machine_faults=3, first_pause=0.0)


COMMAND = (sys.executable, str(Path(child.__file__)))
"""Runs the stand-in instead of a cell."""


local = local_executor({}, COMMAND)


def spec(*seeds, **changed):
    """A resolved spec with one run for each seed, and no grid."""
    method = {"name": "last", "strategy": "last", "adapter": "lora", "draws": 1}
    return {
        "name": "small",
        "models": [{"name": "m", "model": "m"}],
        "tasks": [{"name": "t", "data": "t"}],
        "methods": [method],
        "seeds": list(seeds),
        "steps": 4,
        "margins": {"heldout_loss": 0.01},
        "versions": {},
        **SETTINGS,
        **changed,
    }


@pytest.fixture
def campaign(tmp_path):
    """Runs a campaign of stand-ins; gives the place of each seed's cell."""

    def run(made, **options):
        options = {"executor": local, "workers": 2, "budget": BUDGET, **options}
        run_campaign(made, tmp_path / "small", tmp_path, **options)
        return places(made, tmp_path / "small")

    return run


def places(made, folder):
    return [CellFolder.of(folder, cell) for cell in cells(made)]


def kinds(place):
    return [event["kind"] for event in place.events()]


def test_the_driver_says_how_many_cells_it_runs_at_a_time(campaign, tmp_path):
    assert driver_workers(tmp_path / "small") is None
    campaign(spec(child.DONE), workers=3)
    assert driver_workers(tmp_path / "small") == 3


# --- how attempts end -------------------------------------------------------------------------------------------


def test_faults_of_the_machine_are_tried_again_and_those_of_the_program_are_not(campaign):
    seeds = (
        child.DONE,
        child.KILLED_ONCE,
        child.DISK_FULL,
        child.MEMORY,
        child.MEMORY_ONCE,
        child.SEGFAULT,
        child.RAISES,
        child.NO_RECORD,
    )
    found = campaign(spec(*seeds))
    done, killed, full, memory, memory_once, segfault, raises, no_record = found
    assert [place.state()[0] for place in found] == ["done", "done", "failed", "oom", "done", *["failed"] * 3]
    assert [place.record()["attempts"] for place in found] == [1, 2, 3, 3, 2, 1, 1, 1]
    ended = [event["data"] for event in killed.events() if event["kind"] == "attempt_ended"]
    assert [(event["cause"], event["reason"]) for event in ended] == [("machine", "SIGKILL")]
    assert "gave up after 3 attempts that the machine ended, the last by no space left" in full.state()[1]
    assert memory.state()[1] == "out of memory with 1 rows at a time"
    assert kinds(memory_once).count("attempt_started") == 2
    assert "SIGSEGV" in segfault.state()[1]
    assert raises.state()[1] == "ValueError: always"
    assert "exit code 1): cannot import something" in no_record.state()[1]
    assert not any((place.path / "scratch").exists() for place in found)
    assert kinds(done) == ["attempt_started", "finished"]


def test_what_ended_is_left_alone_and_what_ended_badly_runs_again_when_asked(campaign):
    made = spec(child.DONE, child.RAISES)
    campaign(made)
    done, raises = campaign(made)
    assert (done.record()["attempts"], raises.record()["attempts"]) == (1, 1)
    done, raises = campaign(made, retry_failed=True)
    assert (done.record()["attempts"], raises.record()["attempts"]) == (1, 2)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_an_interrupted_driver_stops_its_cells_and_the_next_one_goes_on(campaign, tmp_path, number):
    made = spec(child.ENDLESS)
    (place,) = places(made, tmp_path / "small")

    def interrupt():
        while not place.is_locked() or not place.events():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        campaign(made)
    thread.join()
    assert not place.is_locked()
    assert place.state() == ("interrupted", "its driver ended")
    assert place.events()[-1]["data"]["cause"] == "driver"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_cell_ends_with_its_driver(tmp_path):
    (place,) = places(spec(child.ENDLESS), tmp_path)
    place.make()
    job = local(place.path, tmp_path)
    while not place.is_locked():
        time.sleep(0.01)
    job._process.stdin.close()  # what the end of this process would do
    assert job.wait() == -signal.SIGKILL


def test_a_kill_by_the_kernel_for_memory_is_no_fault_of_the_machine(campaign, monkeypatch):
    counts = iter(range(100))
    monkeypatch.setattr("aletheia_lora.campaign.runner.oom_kills", lambda: next(counts))
    (place,) = campaign(spec(child.KILLED_ONCE, batch_size=3))
    assert place.state() == ("oom", "out of memory with 3 rows at a time")  # 3 rows cannot be halved


def test_a_process_that_cannot_be_started_ends_the_driver_and_nothing_is_lost(campaign, tmp_path):
    def start(_folder, _base):
        raise OSError(12, "Cannot allocate memory")

    with pytest.raises(OutputError, match=r"Cannot allocate memory\. Nothing is lost"):
        campaign(spec(child.DONE), executor=start)
    (place,) = campaign(spec(child.DONE))
    assert place.state() == ("done", None)


def test_a_campaign_runs_outside_the_main_thread(campaign):
    thread = threading.Thread(target=campaign, args=(spec(child.DONE),))
    thread.start()
    thread.join()
    (place,) = campaign(spec(child.DONE))
    assert place.record()["attempts"] == 1


def test_a_full_disk_starts_nothing_and_loses_nothing(campaign, monkeypatch):
    monkeypatch.setattr("aletheia_lora.campaign.runner.FREE_BYTES", 1 << 60)
    with pytest.raises(OutputError, match="make room and run the campaign again"):
        campaign(spec(child.DONE))
    monkeypatch.undo()
    (place,) = campaign(spec(child.DONE))
    assert place.record()["attempts"] == 1


# --- who may run what -------------------------------------------------------------------------------------------


def test_a_second_driver_is_refused_and_named(campaign, tmp_path):
    with driver_lock(tmp_path / "small"), pytest.raises(LockedError, match=rf"process {os.getpid()} on .* since 20"):
        campaign(spec(child.DONE))
    assert not (tmp_path / "small" / "campaign.json").exists()


def test_a_changed_spec_is_refused_with_its_diff_and_then_keeps_what_is_the_same(campaign):
    campaign(spec(child.DONE))
    with pytest.raises(ConfigError, match=r"margins\.heldout_loss: 0\.01 -> 0\.02.*--accept-change"):
        campaign(spec(child.DONE, margins={"heldout_loss": 0.02}))
    changed = spec(child.DONE, child.KILLED_ONCE, margins={"heldout_loss": 0.02})
    first, _ = campaign(changed, accept_change=True)
    assert first.record()["attempts"] == 1
    campaign(changed)


def test_an_accepted_change_is_kept_and_a_margin_that_moved_is_not_called_fixed(campaign, tmp_path):
    folder, margins = tmp_path / "small", {"heldout_loss": 0.01, "other_loss": 0.02}
    campaign(spec(0, margins=margins), executor=at_once({}))
    assert accepted_changes(folder) == [] and "was changed" not in report_text(folder)
    assert "Margins, fixed beforehand: heldout_loss 0.01 nats, other_loss 0.02 nats." in report_text(folder)
    made = spec(0, 1, margins={**margins, "heldout_loss": 0.5})
    campaign(made, executor=at_once({}), accept_change=True)
    campaign(made, executor=at_once({}), accept_change=True)  # the same again is no change
    (change,) = accepted_changes(folder)
    assert (change["num_cells"], change["at"][:2]) == (1, "20")
    assert change["changes"] == ["seeds: [0] -> [0, 1]", "margins.heldout_loss: 0.01 -> 0.5"]
    text, record = report_text(folder), campaign_record(folder)
    assert "Margins, fixed beforehand: other_loss 0.02 nats.\n" in text
    assert "Margins, changed after cells had run: heldout_loss 0.5 nats.\n" in text
    assert "The spec was changed; cells that had run by then: 1. seeds: " in text and change["at"][:10] not in text
    page = render_campaign(record, {}, {name: shown(name, rows) for name, rows in record["tables"].items()})
    assert "fixed before the first run: other loss 0.02." in page
    assert "changed after cells had run: heldout loss 0.5." in page
    assert f"The spec was changed on {change['at'][:10]}; cells that had run by then: 1. seeds: " in page


def test_a_margin_that_changed_before_any_cell_had_a_record_was_fixed_beforehand(tmp_path):
    pin(spec(0), tmp_path, accept_change=False)
    pin(spec(0, margins={"heldout_loss": 0.5}), tmp_path, accept_change=True)
    record = campaign_record(tmp_path)
    assert (record["accepted_changes"][0]["num_cells"], record["changed_margins"]) == (0, [])
    place = places(spec(0), tmp_path)[0]
    place.make()
    place.finish("failed", "gave up")
    place.retry()
    pin(spec(0, margins={"heldout_loss": 0.6}), tmp_path, accept_change=True)
    record = campaign_record(tmp_path)
    assert (record["accepted_changes"][1]["num_cells"], record["changed_margins"]) == (1, ["heldout_loss"])


def test_the_folder_of_another_campaign_or_of_something_else_is_refused(campaign, tmp_path):
    campaign(spec(child.DONE))
    with pytest.raises(ConfigError, match="holds the campaign 'small'"):
        campaign(spec(child.DONE, name="other"), accept_change=True)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("x")
    with pytest.raises(OutputError, match="holds no campaign"):
        run_campaign(spec(child.DONE), tmp_path / "thesis", tmp_path, executor=local)
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["thesis.tex"]
    with pytest.raises(ConfigError, match="workers=0"):
        campaign(spec(child.DONE), workers=0)


# --- what is said of it -----------------------------------------------------------------------------------------


def test_a_mean_says_over_how_many_and_what_is_missing(campaign, tmp_path):
    campaign(spec(child.DONE, child.KILLED_ONCE, child.RAISES, child.SEGFAULT))
    (method,) = tables(tmp_path / "small")["methods"]
    assert (method["n"], method["of"], method["gaps"]) == (2, 4, "2 failed")
    assert method["mean_heldout_loss"] == 2.5
    text = write_report(tmp_path / "small")
    assert "2 of 4 runs ended well" in text and "| 2 | 4 | 2.5000 | 2 failed |" in text
    assert "ValueError: always" in text
    assert (tmp_path / "small" / "methods.csv").read_text().splitlines()[1] == "m,t,steps,last,2,4,2.5,,2 failed"


def test_a_mean_of_nothing_is_not_0(campaign, tmp_path):
    campaign(spec(child.RAISES))
    (method,) = tables(tmp_path / "small")["methods"]
    assert (method["n"], method["mean_heldout_loss"]) == (0, None)
    assert "| 0 | 1 | 1 failed |" in write_report(tmp_path / "small")


def test_a_run_whose_grid_changed_afterwards_is_in_no_mean(campaign, tmp_path):
    (place,) = campaign(spec(child.DONE))
    (place.path / "record.json").unlink()
    place.finish("done", heldout_loss=2.0, learning_rate=0.5, grid=[], layers=[0])
    (run,), (method,) = (tables(tmp_path / "small")[name] for name in ("runs", "methods"))
    assert (run["state"], method["n"], method["gaps"]) == ("invalid", 0, "1 invalid")


def test_a_grid_that_was_opened_again_is_waited_for_and_its_runs_are_in_no_mean(campaign, tmp_path):
    made = spec(child.DONE, learning_rates=[1e-3, 1e-2])
    low, high, run = places(made, tmp_path / "small")
    for place in (low, high, run):
        place.make()
    low.finish("done", validation_loss=3.0)
    high.finish("failed", "gave up")
    rate, grid = chosen_rate(run)
    assert (rate, [entry["state"] for entry in grid]) == (1e-3, ["done", "failed"])
    run.finish("done", heldout_loss=2.0, learning_rate=rate, grid=grid, layers=[0])
    write_json(tmp_path / "small" / "campaign.json", made)
    assert tables(tmp_path / "small")["methods"][0]["n"] == 1
    high.retry()
    assert tables(tmp_path / "small")["methods"][0]["gaps"] == "1 invalid"


def at_once(losses):
    """An executor whose cells end as they start: of the grid with these validation losses, or badly without one."""

    class Ended:
        def __init__(self, path, _base):
            place = CellFolder.open(path)
            content = place.cell.content
            with place.lock():
                place.append("attempt_started", pid=1)
                if content["kind"] == "evaluation":
                    digest = trained_run(place)["result"]["adapter_digest"]
                    place.finish("done", evaluation={}, adapter_digest=digest)
                elif content["kind"] == "run":
                    rate, grid = chosen_rate(place)
                    facts = {"learning_rate": rate, "grid": grid, "adapter_digest": f"trained at {rate}"}
                    place.finish("done", **facts, heldout_loss=2.0, layers=[0])
                elif content["learning_rate"] in losses:
                    place.finish("done", validation_loss=losses[content["learning_rate"]])
                else:
                    place.finish("failed", "gave up")

        def poll(self):
            return 0

        def stop(self):
            pass

    return Ended


@pytest.mark.parametrize(("loss", "rate", "attempts"), [(4.0, 1e-3, 1), (2.0, 1e-2, 2)], ids=["worse", "better"])
def test_a_rate_that_ends_well_later_runs_again_only_what_it_overtook(campaign, tmp_path, loss, rate, attempts):
    made = spec(0, 1, learning_rates=[1e-3, 1e-2], evaluation={"tasks": ["quiz"]})
    _, high, *later = campaign(made, executor=at_once({1e-3: 3.0}))
    assert high.state()[0] == "failed"
    campaign(made, executor=at_once({1e-3: 3.0, 1e-2: loss}), retry_failed=True)
    assert [one.state for one in outcomes(tmp_path / "small", made)] == ["done"] * 6
    assert [place.record()["result"].get("learning_rate") for place in later] == [rate, rate, None, None]
    assert {place.record()["result"]["adapter_digest"] for place in later} == {f"trained at {rate}"}
    assert [place.record()["attempts"] for place in later] == [attempts] * 4
    assert [(place.path / "record-before-retry-1.json").exists() for place in later] == [attempts > 1] * 4


def test_a_run_that_was_overtaken_is_invalid_and_says_what_mends_it(campaign, tmp_path):
    made = spec(0, learning_rates=[1e-3, 1e-2], evaluation={"tasks": ["quiz"]})
    _, high, *later = campaign(made, executor=at_once({1e-3: 3.0}))
    high.retry()
    campaign(made, executor=at_once({1e-2: 2.0}))
    found = outcomes(tmp_path / "small", made)[2:]
    assert [(one.state, one.overtaken) for one in found] == [("invalid", True)] * 2
    assert found[0].reason == (
        "its grid of learning rates gives another rate now: run the campaign with --retry-failed"
    )
    campaign(made, executor=at_once({}), retry_failed=True)  # the grid is whole: nothing of it runs again
    assert [one.state for one in outcomes(tmp_path / "small", made)] == ["done"] * 4
    retried = [event["data"]["reason"] for event in later[0].events() if event["kind"] == "retried"]
    assert retried == [found[0].reason]


def test_an_evaluation_of_another_adapter_than_its_run_has_is_invalid_until_it_is_asked_again(campaign, tmp_path):
    made = spec(0, evaluation={"tasks": ["quiz"]})
    run, asked = campaign(made, executor=at_once({}))
    values = {**run.record()["result"], "adapter_digest": "another"}
    (run.path / "record.json").unlink()
    run.finish("done", **values)
    trained, found = outcomes(tmp_path / "small", made)
    assert (trained.state, found.state) == ("done", "invalid")
    assert found.reason == "it asked another adapter than its run has now: run the campaign with --retry-failed"
    campaign(made, executor=at_once({}), retry_failed=True)
    assert [one.state for one in outcomes(tmp_path / "small", made)] == ["done"] * 2
    assert (run.record()["result"], asked.record()["result"]["adapter_digest"]) == (values, "another")


def test_a_run_whose_whole_grid_failed_fails_with_its_reason_and_starts_nothing(campaign, tmp_path):
    made = spec(child.DONE, learning_rates=[1e-3, 1e-2])
    low, high, run = places(made, tmp_path / "small")
    for place in (low, high):
        place.make()
        place.finish("failed", "ValueError: no such column")
    write_json(tmp_path / "small" / "campaign.json", made)
    campaign(made)
    assert run.state() == ("failed", "no learning rate of the grid ended well; the first: ValueError: no such column")
    assert run.record()["attempts"] == 0


def test_a_live_status_ends_with_the_campaign(campaign, tmp_path, capsys):
    (tmp_path / "spec.yaml").write_text("name: small")
    campaign(spec(child.DONE))
    assert shown_live(tmp_path / "spec.yaml", None) is False
    assert "small: 1 cells, 1 done; nothing left to do" in capsys.readouterr().out


def test_the_status_counts_states_and_says_what_is_left(campaign, tmp_path):
    made = spec(child.DONE, child.RAISES)
    campaign(made)
    record = status(tmp_path / "small")
    assert record["states"] == {"failed": 1, "done": 1} and record["seconds_left"] == 0
    assert "nothing left to do" in status_text(record) and "ValueError: always" in status_text(record)
    more = spec(child.DONE, child.RAISES, child.ENDLESS, child.MEMORY)
    write_json(tmp_path / "small" / "campaign.json", more)
    with driver_lock(tmp_path / "small"):
        record = status(tmp_path / "small")
    assert record["states"] == {"planned": 2, "failed": 1, "done": 1}
    assert record["seconds_left"] == pytest.approx(1.0)
    assert f"process {os.getpid()}" in record["driver"]
    assert "about 1 s left" in status_text(record)


def test_a_status_without_a_campaign_says_how_to_start_one(tmp_path):
    with pytest.raises(ConfigError, match="aletheia campaign run"):
        status(tmp_path / "none")


def test_a_damaged_record_is_in_no_table(campaign, tmp_path):
    (place,) = campaign(spec(child.DONE))
    file = place.path / "record.json"
    file.write_text(file.read_text().replace("2.0", "1.0"))
    with pytest.raises(AletheiaError, match="damaged"):
        tables(tmp_path / "small")


def test_text_that_a_spreadsheet_would_run_is_marked_and_a_table_keeps_its_columns(tmp_path):
    assert csv_text([{"a": "=1+1", "b": -0.5, "c": "@x"}]) == "a,b,c\n'=1+1,-0.5,'@x\n"
    assert csv_text([]) == ""


def test_pauses_grow_and_have_an_end(campaign, monkeypatch):
    paused = []
    budget = replace(BUDGET, machine_faults=4, first_pause=0.001, longest_pause=0.002)
    campaign(spec(child.DISK_FULL), budget=budget, say=paused.append)
    assert sum("again in 0 s" in line for line in paused) == 3
