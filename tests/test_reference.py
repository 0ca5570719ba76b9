"""The public package 0.1.2 and its own unit tests beside ours; skipped, saying why, where it cannot be had."""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

import aletheia_lora
from aletheia_lora import gradient_probe, select_layers
from families import build

pytestmark = pytest.mark.slow

RELEASE = "aletheia-lora==0.1.2"
PERCENTS = (1, 10, 25, 50, 75, 100)
SCORES = """
import json, sys
import aletheia_lora, torch
from transformers import AutoModelForCausalLM
from aletheia_lora import gradient_probe, select_layers

given = json.load(open(sys.argv[1]))
model = AutoModelForCausalLM.from_pretrained(given["model"])
rows = [{key: torch.tensor(row[key]) for key in ("input_ids", "attention_mask")} for row in given["rows"]]
scores = gradient_probe(model=model, dataset=rows, **given["options"])
chosen = {percent: select_layers(scores, top_pct=percent) for percent in given["percents"]}
print(json.dumps({"file": aletheia_lora.__file__, "scores": scores, "chosen": chosen}))
"""


def pip(*arguments):
    """Run pip; skip the test with pip's own reason where it fails."""
    options = ("--disable-pip-version-check", "--no-input", "--retries", "1", "--timeout", "15")
    done = subprocess.run([sys.executable, "-m", "pip", *arguments, *options], capture_output=True, text=True)
    if done.returncode:
        reason = [line for line in done.stderr.splitlines() if line.strip()] or ["no reason given"]
        pytest.skip(f"pip could not get {RELEASE}: {reason[-1]}")


@pytest.fixture(scope="session")
def public_package(tmp_path_factory):
    """A folder with the published wheel and nothing else."""
    folder = tmp_path_factory.mktemp("public")
    pip("install", "--no-deps", "--no-compile", "--target", str(folder), RELEASE)
    return folder


@pytest.fixture(scope="session")
def public_tests(tmp_path_factory):
    """The unit tests of the published source distribution, alone in a folder."""
    folder = tmp_path_factory.mktemp("sdist")
    unbuilt = ("--no-deps", "--no-binary", ":all:", "--no-build-isolation")
    pip("download", *unbuilt, "--dest", str(folder), RELEASE)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as source:
        source.extractall(folder, filter="data")
    (tests,) = folder.glob("*/tests")
    return tests.rename(folder / "tests")


def process(arguments, python_path, cwd):
    environment = {**os.environ, "PYTHONPATH": str(python_path)}
    done = subprocess.run([sys.executable, *arguments], env=environment, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"num_layers": 4, "probe_batches": 5}),
        ("llama", {"num_layers": 4, "probe_batches": 3, "chunk_size": 3, "seed": 7}),
        ("gemma2", {"num_layers": 4, "probe_batches": 4}),
    ],
    ids=["as documented", "in chunks, another seed", "another family"],
)
def test_scores_and_selections_are_those_of_the_public_package(
    public_package, tmp_path, tokenized_rows, family, options
):
    model = build(family).eval()
    with torch.no_grad():  # so that the layers differ by more than rounding
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and ".layers." in name:
                parameter.mul_(1.0 + 0.5 * int(name.split(".layers.")[1].split(".")[0]))
    model.save_pretrained(tmp_path / "model")
    rows = tokenized_rows(9)  # of one length: the public package scores padding, too
    given = {"model": str(tmp_path / "model"), "rows": rows, "options": options, "percents": PERCENTS}
    (tmp_path / "given.json").write_text(json.dumps(given))
    printed = process(["-c", SCORES, str(tmp_path / "given.json")], public_package, tmp_path)
    theirs = json.loads(printed.splitlines()[-1])
    assert Path(theirs["file"]).is_relative_to(public_package)

    ours = gradient_probe(model=model, dataset=rows, **options)
    assert dict(ours) == pytest.approx({int(layer): score for layer, score in theirs["scores"].items()}, rel=1e-5)
    assert {str(percent): select_layers(ours, top_pct=percent) for percent in PERCENTS} == theirs["chosen"]


def test_the_public_packages_own_unit_tests_pass_unmodified(public_tests):
    ours = Path(aletheia_lora.__file__).parents[1]
    check = f"import aletheia_lora; assert aletheia_lora.__file__ == {aletheia_lora.__file__!r}"
    process(["-c", check], ours, public_tests.parent)
    printed = process(["-m", "pytest", "-p", "no:cacheprovider", "-q", "tests"], ours, public_tests.parent)
    assert printed.splitlines()[-1].startswith("30 passed")
