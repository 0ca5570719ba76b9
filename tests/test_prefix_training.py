"""The prefix cache in the trainer: the same losses under every setting, and a record of what it did."""

import re
import warnings

import numpy as np
import pytest
import trl
from datasets import Dataset

from aletheia_lora.data import tokenize
from aletheia_lora.errors import ConfigError, PlanError
from aletheia_lora.planning import plan
from aletheia_lora.training.prefix_cache import PrefixCacheOptions
from aletheia_lora.training.prefix_forecast import expected_lines
from aletheia_lora.training.run import TrainOptions, train_adapter
from aletheia_lora.training.trainer import SFTTrainer
from families import build
from tiny_inputs import word_tokenizer


@pytest.fixture
def rows(tokenized_rows):
    return tokenize(tokenized_rows(6, min_length=8, max_length=16, num_prompt_tokens=4), word_tokenizer())


def trained(tmp_path, rows, made, model=None, prefix_cache=None, **changes):
    settings = {"max_steps": 9, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1}
    settings |= {"save_strategy": "no", "report_to": [], "disable_tqdm": True, "use_cpu": True, "bf16": False}
    settings |= {"gradient_checkpointing": False, "seed": 3, "output_dir": str(tmp_path / "trl"), **changes}
    model = build("llama") if model is None else model
    trainer = SFTTrainer(
        model,
        trl.SFTConfig(**settings),
        plan=made,
        train_dataset=rows,
        eval_dataset=rows[:3],
        processing_class=word_tokenizer(),
        prefix_cache=prefix_cache,
    )
    trainer.train()
    return trainer, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
        {"per_device_train_batch_size": 4},
        {"bf16": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"eval_strategy": "steps", "eval_steps": 2},
    ],
    ids=["plain", "accumulation", "smaller last batch", "bf16", "reentrant checkpointing", "evaluation"],
)
def test_training_with_the_cache_is_training_without_it(tmp_path, rows, changes):
    made = plan(build("llama"), rows, probe_batches=2, rank=4, allocation="uniform", strategy="last", num_layers=2)
    _, plain = trained(tmp_path, rows, made, **changes)
    said = []
    trainer, losses = trained(tmp_path, rows, made, prefix_cache=PrefixCacheOptions(say=said.append), **changes)
    assert losses == pytest.approx(plain, abs=2e-5 if not changes.get("bf16") else 2e-2)
    record = trainer.prefix_cache_record
    assert record["turned_off"] is None and record["hits"] > record["misses"] > 0 and record["passed_by"] == {}
    forecast = int(re.search(r"for (\d+) tokens", said[0])[1]) * 32 * 4  # width, float32
    assert 0 < record["bytes_held"] <= forecast
    assert trainer.lowest_backward_layer == 2 and trainer.dead_adapters == []
    assert "forward" not in vars(trainer.model.get_base_model().model.layers[0])


def test_a_head_that_trains_does_not_turn_the_cache_off(tmp_path, rows):
    chosen = {"allocation": "uniform", "strategy": "last", "num_layers": 2, "modules_to_save": ("lm_head",)}
    made = plan(build("llama"), rows, probe_batches=2, rank=4, **chosen)
    _, plain = trained(tmp_path, rows, made)
    trainer, losses = trained(tmp_path, rows, made, prefix_cache=PrefixCacheOptions())
    assert losses == pytest.approx(plain, abs=2e-5)
    assert trainer.prefix_cache_record["turned_off"] is None and trainer.prefix_cache_record["hits"] > 0


def test_padding_free_training_is_replayed(tmp_path, rows):
    made = plan(build("llama"), rows, probe_batches=2, rank=4, allocation="uniform", strategy="last", num_layers=2)
    changes = {"packing": True, "max_length": 40}
    trainer, _ = trained(tmp_path, rows, made, prefix_cache=PrefixCacheOptions(), **changes)
    assert trainer.prefix_cache_record["hits"] > 0 and trainer.prefix_cache_record["turned_off"] is None


def test_the_record_of_a_training_says_what_the_cache_did(tmp_path, rows):
    made = plan(build("llama"), rows, probe_batches=2, rank=4, allocation="uniform", strategy="last", num_layers=2)
    options = TrainOptions(steps=6, batch_size=2, prefix_cache=True, prefix_cache_dir=tmp_path / "kept")
    said = []
    record = train_adapter(build("llama"), word_tokenizer(), made, rows, tmp_path / "a", options, say=said.append)
    assert record["options"]["prefix_cache_dir"] == "kept"
    done = record["prefix_cache"]
    assert record["padding"]["num_padding"] > 0 and record["padding"]["turned_off"] is None
    tried = 2  # rows by which it was found out that padding can be left out
    assert (done["misses"], done["hits"], done["shared"]) == (6 + tried, 6, True) and done["bytes_written"] > 0
    assert done["read_seconds"] > 0 and done["write_seconds"] > 0 and done["largest_difference"] < 1e-6
    assert any(line.startswith("prefix cache below layer 2: at most") for line in said)
    record = train_adapter(build("llama"), word_tokenizer(), made, rows, tmp_path / "b", options)
    assert (record["prefix_cache"]["misses"], record["prefix_cache"]["hits"]) == (0, 12 + tried)


def test_a_run_that_meets_no_row_twice_says_that_it_replays_nothing(tmp_path, rows):
    made = plan(build("llama"), rows, probe_batches=2, rank=4, allocation="uniform", strategy="last", num_layers=2)
    for steps, epochs in ((3, "one"), (4, "more than one")):
        options = TrainOptions(steps=steps, batch_size=2, prefix_cache=True)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            record = train_adapter(build("llama"), word_tokenizer(), made, rows, tmp_path / epochs, options)
        warned = [str(entry.message) for entry in caught if "meet none of the 6 rows twice" in str(entry.message)]
        assert len(warned) == (epochs == "one") and all("more than 3 steps" in text for text in warned)
        kept, card = record["prefix_cache"], (tmp_path / epochs / "README.md").read_text()
        assert (kept["in_vain"] is not None, kept["hits"] == 0) == ((True, True) if epochs == "one" else (False, False))
        assert ("were replayed at 0 % of the rows visited" in card) is (epochs == "one")
    said, folder = [], tmp_path / "kept"
    options = TrainOptions(steps=3, batch_size=2, prefix_cache=True, prefix_cache_dir=folder)  # for others: no warning
    train_adapter(build("llama"), word_tokenizer(), made, rows, tmp_path / "shared", options, say=said.append)
    assert any("meet none of the 6 rows twice" in line for line in said)


def test_a_cache_asked_for_in_vain_is_an_error_before_training(tmp_path, rows):
    made = plan(build("llama"), rows, probe_batches=2, rank=4, allocation="uniform", strategy="all")
    for trainer in (
        lambda: trained(tmp_path, rows, made, prefix_cache=PrefixCacheOptions()),
        lambda: train_adapter(build("llama"), None, made, rows, tmp_path / "a", TrainOptions(prefix_cache=True)),
    ):
        with pytest.raises(PlanError, match="adapts layer 0"):
            trainer()
    with pytest.raises(ConfigError, match="prefix_cache is off"):
        TrainOptions(prefix_cache_dir=tmp_path)


def test_the_forecast_bounds_what_training_meets_whichever_rows_are_drawn(rows):
    data, lengths = rows.to_dataset(), sorted((len(row.input_ids) for row in rows), reverse=True)

    def tokens(held=lambda row: False, **options):
        return [lines.num_tokens(held) for lines in expected_lines(data, **options)]

    assert tokens(num_drawn=60) == [sum(lengths), 0] and tokens(num_drawn=3) == [sum(lengths[:3]), 0]
    assert tokens(num_drawn=3, num_tried=1, evaluated={"a": data, "b": data}) == [
        sum(lengths[:3]),
        lengths[0],
        sum(lengths),
        sum(lengths),
    ]
    longest = max((row.input_ids for row in rows), key=len)
    assert tokens(lambda row: np.array_equal(row, longest), num_drawn=1)[0] == lengths[1]
    packed = Dataset.from_dict({"input_ids": [[4, 5, 6, 7], [8, 9]], "seq_lengths": [[1, 3], [2]]})
    (lines, _) = expected_lines(packed, num_drawn=2)
    assert [[row.tolist() for row in line] for line in lines.lines] == [[[4], [5, 6, 7]], [[8, 9]]]
    assert expected_lines(iter([]), num_drawn=3) is None and expected_lines(data, iter([]), num_drawn=3) is None
