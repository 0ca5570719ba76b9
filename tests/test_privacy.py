import json
import zlib

import pytest

from aletheia_lora.errors import PrivacyError
from aletheia_lora.privacy import (
    KEY,
    PATH,
    Private,
    check_nothing_private,
    json_without_paths,
    private_here,
    without_paths,
)

HOME = "/" + "home/alice"
HERE = Private(folders=(f"{HOME}/work dir", HOME), names=("alice", "gpu-17"), secrets=(("DB_PASSWORD", 'pa"ss&word'),))

PATHS = [
    HOME,
    f"{HOME}/models/x.bin",
    "/srv/data",
    "/etc/passwd",
    "~/models",
    "~alice/models",
    "C:\\Users\\alice",
    "d:/models",
    "file:///srv/x",
]
NO_PATHS = [
    "org/model",
    "https://huggingface.co/org/model",
    "http://localhost:8000/v1",
    "and/or",
    "3/4 of 5 / 6",
    "./models",
    "../models",
    "image/png",
    "nats per token, 2 s/step",
    "<h1>title</h1><br/></style >",
    "iVBORw0KGgo+/9j/4AAQ/Sk==",
    "layers 2-3: 1.30x",
]
KEYS = [
    "hf_" + "AbCdEfGhIjKlMnOpQrStUvWxYz012345",
    "sk-" + "proj-abcdefghijklmnop1234",
    "gh" + "p_0123456789abcdefghij0123456789abcdef",
    "github_" + "pat_11ABCDEFG0123456789",
    "AKIA" + "ABCDEFGHIJKLMNOP",
    "aws_secret_access_key" + " = abcdefghij/klmnop",
    "Authorization: " + "Bearer abcdef.ghijkl",
    "xox" + "b-1234567890-abcdef",
    "-----BEGIN RSA " + "PRIVATE KEY-----",
    "https://alice:" + "secret@example.org/x.git",
]
NO_KEYS = [
    "hf_quantizer",
    "hf_hub_download",
    "task-specific",
    "sk-learn",
    "bearer",
    "a@b.org",
    "https://a.org/b@c",
    "0" * 64,
]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "frame", ["{}", "cannot read '{}': gone", "key={}", '{{"file": "{}"}}', "({})", "x: {}", "<{}/x>"]
)
def test_an_absolute_path_is_seen_and_replaced(path, frame):
    text = frame.format(path)
    assert PATH.search(text)
    left = without_paths(text, Private())
    assert "<path>" in left and not PATH.search(left)
    assert "alice" not in left and "srv" not in left


@pytest.mark.parametrize("text", NO_PATHS)
def test_what_is_no_absolute_path_stays(text):
    assert PATH.search(text) is None
    assert without_paths(text, Private()) == text


@pytest.mark.parametrize("key", KEYS)
def test_a_key_is_seen_and_never_repeated(key):
    assert KEY.search(f"x {key} y")
    with pytest.raises(PrivacyError, match="file, line 2: what looks like a key or a token") as refused:
        check_nothing_private({"file": f"first\nit is {key}\n".encode()}, Private())
    assert key not in str(refused.value)


@pytest.mark.parametrize("text", NO_KEYS)
def test_what_is_no_key_passes(text):
    check_nothing_private({"file": text.encode()}, Private())


def test_folders_with_spaces_and_names_are_put_in_words():
    text = f"OSError: -I{HOME}/work dir/lib.so of Alice on GPU-17.local, not malice"
    assert without_paths(text, HERE) == "OSError: -I<path> of <name> on <name>.local, not malice"
    value = {f"{HOME}/x": [1, None, "alice"], "layers": (f"'{HOME}/a b'",)}
    assert json_without_paths(value, HERE) == {"<path>": [1, None, "<name>"], "layers": ["'<path>'"]}


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (f"x{HOME}/work dir/y", "the path"),
        ("by Alice", "the name 'alice'"),
        ("on gpu-17.cluster", "the name 'gpu-17'"),
        ('it is pa"ss&word', "variable DB_PASSWORD"),
        (json.dumps({"x": 'pa"ss&word'}), "variable DB_PASSWORD"),
        ("<p>pa&quot;ss&amp;word</p>", "variable DB_PASSWORD"),
    ],
)
def test_what_is_private_here_is_refused_however_it_is_spelled(text, what):
    with pytest.raises(PrivacyError, match=what) as refused:
        check_nothing_private({"fine": b"nothing", "file": text.encode()}, HERE)
    assert "ss&word" not in str(refused.value) and "fine" not in str(refused.value)


def test_what_is_private_here_is_read_from_the_process(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "carol"))
    monkeypatch.setenv("MY_API_KEY", "abc123def")
    monkeypatch.setenv("HARMLESS", "abc123def")
    monkeypatch.setattr("getpass.getuser", lambda: "bob-the-user")
    monkeypatch.setattr("platform.node", lambda: "node7.example.org")
    found = private_here(tmp_path / "campaign", names=["worker3", ""], known={"worker3"})
    assert {str(tmp_path / "carol"), str(tmp_path / "campaign")} <= set(found.folders)
    assert found.names == ("bob-the-user", "carol", "node7", "node7.example.org")
    assert ("MY_API_KEY", "abc123def") in found.secrets and "HARMLESS" not in dict(found.secrets)


@pytest.mark.parametrize("user", ["root", "bob"])
def test_a_name_that_says_nothing_or_is_too_short_is_no_name(monkeypatch, user):
    monkeypatch.setenv("HOME", "/")
    monkeypatch.setattr("getpass.getuser", lambda: user)
    monkeypatch.setattr("platform.node", lambda: "localhost")
    assert private_here().names == ()


def test_a_process_without_a_user_has_no_name(monkeypatch):
    def nobody():
        raise KeyError("no such user")

    monkeypatch.setattr("getpass.getuser", nobody)
    private_here()


def chunk(kind, content):
    return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")


def test_a_picture_may_hold_pixels_and_nothing_else():
    start, pixels = b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", b"0" * 13) + chunk(b"IDAT", b"/etc/x") + chunk(b"IEND", b"")
    check_nothing_private({"a.png": start + pixels}, Private())
    for more, what in ((chunk(b"tEXt", b"Author\0x"), "tEXt"), (b"\0\0\0\0tail", "tail")):
        with pytest.raises(PrivacyError, match=f"a.png holds {what} beside its pixels"):
            check_nothing_private({"a.png": start + pixels + more}, Private())
    with pytest.raises(PrivacyError, match="neither text nor a PNG"):
        check_nothing_private({"weights.bin": b"\xff\xfe\x00"}, Private())
