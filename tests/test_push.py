import json
import shlex
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled
from peft import PeftModel
from transformers import AutoModelForCausalLM

from aletheia_lora.cli import main
from aletheia_lora.errors import ConfigError, OutputError, PrivacyError
from aletheia_lora.run_config import resolve
from aletheia_lora.training import push as push_room
from aletheia_lora.training.push import check_can_push, push

pytestmark = pytest.mark.usefixtures("library_logging")
SMALL = ("--validation-rows", "4", "--probe-batches", "2", "--rank", "4", "--strategy", "last", "--num-layers", "2")
SHORT = (*SMALL, "--steps", "1", "--batch-size", "4")
SENT = {"adapter_model.safetensors", "adapter_config.json", "plan.json", "record.json", "README.md"}
LEFT_OUT = {"tokenizer.json", "tokenizer_config.json"}


def http_error(status):
    response = SimpleNamespace(headers={}, request=None, status_code=status)
    return HfHubHTTPError(f"{status} says the Hub", response=response)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A stand-in for the Hub: keeps what it is sent, notes every call, and fails where it is told to."""
    state = SimpleNamespace(calls=[], sent=None, fails={}, private=True, options={})

    class Hub:
        endpoint = "https://hub.example"

        def __init__(self, *args, **kwargs):
            assert not args and not kwargs  # no token is handed in: the library takes its own login

        def called(self, name):
            state.calls.append(name)
            if name in state.fails:
                raise state.fails[name]

        def whoami(self):
            self.called("whoami")

        def create_repo(self, repo_id, *, private, exist_ok):
            state.options = {"private": private, "exist_ok": exist_ok}
            self.called("create_repo")
            return SimpleNamespace(repo_id=repo_id if "/" in repo_id else f"me/{repo_id}")

        def auth_check(self, repo_id, *, write):
            assert write and "/" in repo_id
            self.called("auth_check")

        def repo_info(self, repo_id):
            self.called("repo_info")
            return SimpleNamespace(private=state.private)

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            self.called("upload_folder")
            state.sent = shutil.copytree(folder_path, tmp_path / "on the hub" / repo_id)

    monkeypatch.setattr(push_room, "HfApi", Hub)
    return state


@pytest.fixture
def train(monkeypatch, capsys, model, data, tmp_path):
    """Runs `aletheia train` into a folder `adapter`; gives the exit code, what was printed and the error."""

    def run(*arguments):
        output = ("--output", str(tmp_path / "adapter"))
        monkeypatch.setattr(sys, "argv", ["aletheia", "train", model, data, *SHORT, *output, *arguments])
        code = 0
        try:
            main()
        except SystemExit as ended:
            code = ended.code or 0
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def names(folder):
    return {path.name for path in folder.iterdir()}


# --- when all goes well -----------------------------------------------------------------------------------------


def test_a_trained_adapter_is_pushed_without_paths(train, hub, model, tmp_path):
    code, printed, _ = train("--push-to-hub", "my-adapter")
    assert (code, hub.calls) == (0, ["whoami", "create_repo", "auth_check", "upload_folder"])
    assert hub.options == {"private": None, "exist_ok": True}
    assert "pushed to https://hub.example/me/my-adapter" in printed
    assert names(hub.sent) == SENT
    assert names(tmp_path / "adapter") >= SENT | LEFT_OUT and "adapter-to-push" not in names(tmp_path)
    here = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    there = json.loads((hub.sent / "adapter_config.json").read_text())
    assert (here["base_model_name_or_path"], there["base_model_name_or_path"]) == (model, "tiny-llama")
    for file in hub.sent.iterdir():
        assert str(Path(model).parent).encode() not in file.read_bytes(), file.name
    assert ModelCard.load(hub.sent / "README.md").data.base_model == "tiny-llama"
    for name in SENT - {"adapter_config.json"}:
        assert (hub.sent / name).read_bytes() == (tmp_path / "adapter" / name).read_bytes()
    base = AutoModelForCausalLM.from_pretrained(model)
    assert len(PeftModel.from_pretrained(base, hub.sent).peft_config) == 1


def test_paths_in_a_record_do_not_leave_the_machine(train, hub, tmp_path):
    train()
    file = tmp_path / "adapter" / "record.json"
    record = json.loads(file.read_text())
    file.write_text(json.dumps({**record, "note": f"read from '{tmp_path}/my rows.jsonl'", f"{tmp_path}/x": 1}))
    push(tmp_path / "adapter", "me/a")
    sent = json.loads((hub.sent / "record.json").read_text())
    assert sent == {**record, "note": "read from '<path>'", "<path>": 1}


def test_private_and_the_repository_may_stand_in_the_file(train, hub, tmp_path):
    (tmp_path / "run.yaml").write_text("push_to_hub: me/my-adapter\nprivate: true\n")
    assert resolve(tmp_path / "run.yaml", {}).push_to_hub == "me/my-adapter"
    code, printed, _ = train("--config", str(tmp_path / "run.yaml"), "--json")
    assert code == 0 and json.loads(printed)["pushed"] == "https://hub.example/me/my-adapter"
    assert hub.options == {"private": True, "exist_ok": True} and "repo_info" in hub.calls


# --- what is found out before training --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ("whoami", LocalTokenNotFoundError("no token"), "nobody is logged in. Run `hf auth login`"),
        ("whoami", http_error(401), "401 says the Hub Run `hf auth login` with a token that may write"),
        ("whoami", OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE is set"),
        ("whoami", ConnectionError("no route"), "the Hub cannot be reached: ConnectionError: no route"),
        ("whoami", RuntimeError(""), "the Hub cannot be reached: RuntimeError: no reason given"),
        ("create_repo", http_error(403), "403 says the Hub Run `hf auth login`"),
        ("create_repo", http_error(500), "500 says the Hub"),
        ("auth_check", http_error(403), "or choose another repository"),
    ],
)
def test_what_cannot_be_pushed_is_not_trained(train, hub, monkeypatch, tmp_path, call, error, message):
    monkeypatch.setattr("aletheia_lora.runs.load_model", None)  # would raise if called
    hub.fails[call] = error
    code, printed, said = train("--push-to-hub", "me/a")
    assert (code, printed, hub.calls[-1]) == (1, "", call)
    assert said.startswith("error: cannot push to 'me/a': ") and message in said and said.count("\n") == 1
    assert not (tmp_path / "adapter").exists()


def test_a_public_repository_is_not_pushed_to_where_a_private_one_was_asked_for(hub, tmp_path):
    hub.private = False
    with pytest.raises(ConfigError, match="'me/a' exists and is public"):
        check_can_push("me/a", tmp_path / "adapter", private=True)
    assert check_can_push("a", tmp_path / "adapter") == "me/a"


@pytest.mark.parametrize("name", ["a/b/c", "../a", "a b", "", "-a", "https://example.org/a"])
def test_a_name_that_no_repository_can_have_is_refused(hub, tmp_path, name):
    with pytest.raises(ConfigError, match="push_to_hub="):
        check_can_push(name, tmp_path / "adapter")
    assert hub.calls == []


def test_private_alone_means_nothing(train, hub):
    code, _, said = train("--private")
    assert code == 1 and "private was given without push_to_hub" in said and hub.calls == []


def test_a_copy_of_an_earlier_push_is_found_before_training(hub, tmp_path):
    (tmp_path / "adapter-to-push").mkdir()
    (tmp_path / "adapter-to-push" / "x").write_text("x")
    with pytest.raises(OutputError, match="adapter-to-push' exists"):
        check_can_push("me/a", tmp_path / "adapter")
    assert hub.calls == []


# --- when pushing fails -----------------------------------------------------------------------------------------


def test_a_push_that_fails_leaves_everything_and_says_the_line_for_later(train, hub, tmp_path):
    hub.fails["upload_folder"] = ConnectionError("line cut")
    code, printed, said = train("--push-to-hub", "me/a", "--private")
    assert (code, printed) == (1, "") and "line cut" in said and f"whole in {str(tmp_path / 'adapter')!r}" in said
    assert names(tmp_path / "adapter") >= SENT | LEFT_OUT
    command = shlex.split(said.splitlines()[-1].partition("Push it later by: ")[2])
    assert command == ["hf", "upload", "me/a", str(tmp_path / "adapter-to-push"), ".", "--private"]
    assert names(Path(command[3])) == SENT
    assert str(tmp_path) not in (Path(command[3]) / "adapter_config.json").read_text()


def test_a_key_is_not_sent(train, hub, tmp_path, monkeypatch):
    train()
    monkeypatch.setenv("MY_SECRET", "open sesame")
    file = tmp_path / "adapter" / "record.json"
    record = json.loads(file.read_text())
    for text in ("hf_" + "AbCdEfGhIjKlMnOpQrSt", "it is open sesame"):
        file.write_text(json.dumps({**record, "note": text}))
        with pytest.raises(PrivacyError, match="The adapter is whole in") as refused:
            push(tmp_path / "adapter", "me/a")
        assert text not in str(refused.value)
        assert hub.calls == [] and "adapter-to-push" not in names(tmp_path)
