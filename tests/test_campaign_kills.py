"""A campaign killed at random and resumed gives the tables of an undisturbed one, with no cell lost or doubled."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from aletheia_lora.campaign.records import CellFolder
from aletheia_lora.campaign.report import tables, write_report
from aletheia_lora.campaign.spec import cells
from aletheia_lora.campaign.status import pinned_spec
from tiny_inputs import save_model, save_rows, word_rows

SPEC = """
name: kills
models: [tiny-llama]
tasks: [{name: words, data: rows.jsonl}]
methods: [uniform, random]
seeds: [0, 1, 2, 3]
learning_rates: [1e-3, 1e-2]
steps: 3
grid_steps: 2
batch_size: 2
rank: 4
probe_batches: 2
train_rows: 8
validation_rows: 4
heldout_rows: 4
evaluations: 1
margins: {heldout_loss: 0.01}
"""


def campaign(folder, kind, num_kills, seed):
    """Run it twice, in peace and with kills; gives both folders and what was hit."""
    spec = folder / "kills.yaml"
    spec.write_text(SPEC)
    program = Path(__file__).with_name("campaign_forks.py")
    done = subprocess.run(
        [sys.executable, program, spec, folder, str(num_kills), str(seed), kind], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return folder / "calm", folder / "killed", json.loads(done.stdout.splitlines()[-1])


def check_nothing_lost_or_doubled(folder):
    wanted = cells(pinned_spec(folder))
    assert {path.name for path in (folder / "cells").iterdir()} == {cell.folder_name for cell in wanted}
    for cell in wanted:
        place = CellFolder.of(folder, cell)
        kinds = [event["kind"] for event in place.events()]
        assert place.record()["state"] == "done"
        assert kinds.count("finished") <= 1  # a kill between the record and its event leaves none
        assert "finished" not in kinds[:-1]
        assert place.record()["attempts"] == kinds.count("attempt_started")


def check_same(calm, killed):
    assert write_report(killed) == write_report(calm)
    for name in ("report.md", "runs.csv", "methods.csv", "grid.csv"):
        assert (killed / name).read_bytes() == (calm / name).read_bytes()
    assert len(tables(calm)["runs"]) == 8


def test_16_cells_killed_20_times_end_as_if_nothing_had_happened(tmp_path):
    calm, killed, hits = campaign(tmp_path, "stand_in", 20, 0)
    assert hits["num_cells"] == 16  # four of them evaluations
    assert hits["driver"] + hits["cell"] == 20
    check_nothing_lost_or_doubled(killed)
    check_same(calm, killed)


@pytest.mark.slow
def test_12_trained_cells_killed_20_times_give_the_same_table_byte_for_byte(tmp_path):
    save_model(tmp_path / "tiny-llama")
    save_rows(tmp_path / "rows.jsonl", word_rows(32))
    calm, killed, hits = campaign(tmp_path, "cell", 20, 0)
    assert hits["driver"] + hits["cell"] == 20
    check_nothing_lost_or_doubled(killed)
    check_same(calm, killed)
    losses = [run["heldout_loss"] for run in tables(calm)["runs"]]
    assert len(set(losses)) == len(losses)
