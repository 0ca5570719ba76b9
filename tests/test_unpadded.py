import pytest
import torch
from transformers import LlamaConfig

from aletheia_lora.adapter import attach
from aletheia_lora.allocation import AllocationOptions, allocate
from aletheia_lora.anatomy import anatomy
from aletheia_lora.data import NO_LABEL
from aletheia_lora.loss import labelled_loss
from aletheia_lora.padding import ROW_BY_ROW
from aletheia_lora.training.unpadded import Unpadded, without_padding
from families import CONFIGS, build, random_batches

# Which families compute the same without padding, and why the others stay padded.
MIXES = {"mamba": "without padding the loss", "bloom": "", "falcon": "", "gpt_oss": "attention does not run as sdpa"}


def batch_of(lengths, side="right", seed=0):
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.randint(3, 256, (len(lengths), width), generator=generator)
    columns = torch.arange(width)
    mask = (columns < torch.tensor(lengths)[:, None]).long()
    mask = mask if side == "right" else mask.flip(1)
    labels = ids.masked_fill(mask == 0, NO_LABEL)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def adapted(family):
    model = build(family)
    found = anatomy(model)
    peft_model = attach(model, found, allocate(found, (1, 3), "uniform", AllocationOptions(rank=4))).eval()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05, generator=generator)
    return peft_model


def gradients(model, batch):
    model.zero_grad()
    loss = labelled_loss(model, batch)
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("side", ["right", "left"])
def test_rows_are_laid_end_to_end(side):
    batch = batch_of([3, 5, 1], side)
    flat = without_padding(batch)
    rows = [batch["input_ids"][row][batch["attention_mask"][row] == 1] for row in range(3)]
    assert torch.equal(flat["input_ids"][0], torch.cat(rows))
    assert flat["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3, 4, 0]]
    assert flat["cu_seq_lens_q"].tolist() == [0, 3, 8, 9] and flat["max_length_q"] == 5
    assert (flat["labels"] == NO_LABEL).tolist() == [[True, False, False, True, False, False, False, False, True]]


@pytest.mark.parametrize("family", CONFIGS)
def test_losses_and_gradients_are_those_of_the_padded_batch_or_it_stays_padded(family):
    model, batch = adapted(family), batch_of([4, 11, 7, 12])
    expected_loss, expected = gradients(model, batch)
    unpadded = Unpadded(model.get_base_model())
    flat = unpadded.batch(model, batch)
    loss, found = gradients(model, flat)
    unpadded.remove()
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-6)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6)
    taken = unpadded.turned_off is None
    assert (flat["input_ids"].shape[0] == 1) is taken
    assert unpadded.record()["num_padding"] == (14 if taken else 0)
    print(family, unpadded.turned_off)


def test_no_layer_sees_padding_and_no_row_another(monkeypatch):
    model, batch = adapted("llama"), batch_of([4, 11, 7, 12])
    seen = []
    model.get_base_model().model.layers[2].mlp.register_forward_hook(lambda m, args, out: seen.append(args[0].shape))
    unpadded = Unpadded(model.get_base_model())
    flat = unpadded.batch(model, batch)
    seen.clear()
    before = labelled_loss(model, flat).item()
    assert seen == [(1, 34, 32)]
    flat["input_ids"][0, 0] = (flat["input_ids"][0, 0] + 1) % 256  # the first token of the first row
    changed = [labelled_loss(model, {**flat, "labels": only(flat, row)}).item() for row in range(4)]
    monkeypatch.undo()
    again = unpadded.batch(model, batch)
    unchanged = [labelled_loss(model, {**again, "labels": only(again, row)}).item() for row in range(4)]
    assert changed[0] != unchanged[0] and changed[1:] == unchanged[1:]
    assert labelled_loss(model, again).item() == before


def only(flat, row):
    start, stop = flat["cu_seq_lens_q"][row : row + 2].tolist()
    labels = torch.full_like(flat["labels"], NO_LABEL)
    labels[0, start:stop] = flat["labels"][0, start:stop]
    return labels


def test_batches_that_are_nearly_full_or_strange_stay_as_they_are():
    model = adapted("llama")
    unpadded = Unpadded(model.get_base_model())
    for batch in (
        batch_of([12, 12, 12]),
        batch_of([4]),
        {**batch_of([4, 12]), "token_type_ids": torch.zeros(2, 12)},
        {key: value for key, value in batch_of([4, 12]).items() if key != "attention_mask"},
    ):
        assert unpadded.batch(model, batch) is batch
    assert unpadded.turned_off is None


def test_long_rows_under_a_sliding_window_and_padded_batches_go_the_usual_way():
    from transformers import AutoModelForCausalLM, MistralConfig

    config = MistralConfig(
        vocab_size=256, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, sliding_window=6,
    )  # fmt: skip
    torch.manual_seed(0)
    model, batch = AutoModelForCausalLM.from_config(config).eval(), batch_of([4, 11, 7, 12])
    expected = labelled_loss(model, batch)
    short = batch_of([2, 6, 5], seed=1)
    expected_short = labelled_loss(model, short)
    unpadded = Unpadded(model)
    torch.testing.assert_close(labelled_loss(model, batch), expected)
    assert unpadded.batch(model, batch) is batch and unpadded.turned_off is None
    torch.testing.assert_close(labelled_loss(model, without_padding(batch)), expected, rtol=1e-5, atol=1e-6)
    flat = unpadded.batch(model, short)
    assert flat["input_ids"].shape == (1, 13)
    torch.testing.assert_close(labelled_loss(model, flat), expected_short, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("changes", [{"attention_chunk_size": 6}, {"floor_scale": 6}])
def test_lines_beyond_a_chunk_of_attention_stay_padded(changes):
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    sizes = {"vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "head_dim": 8}
    changes = {**changes, "attn_scale": 10.0, "initializer_range": 0.3}
    config = Llama4TextConfig(
        **sizes, num_key_value_heads=2, intermediate_size=32, intermediate_size_mlp=64, num_local_experts=2, **changes
    )
    torch.manual_seed(0)
    model = Llama4ForCausalLM(config).float().eval()
    few, batch = batch_of([2, 3]), batch_of([2, 3, 7, 9], seed=1)
    expected = labelled_loss(model, batch)
    unpadded = Unpadded(model)
    assert unpadded.batch(model, few)["input_ids"].shape == (1, 5)
    assert unpadded.batch(model, batch) is batch and unpadded.turned_off is None
    assert not torch.allclose(labelled_loss(model, without_padding(batch)), expected, rtol=1e-5)


def test_a_loss_that_is_no_number_is_a_difference(monkeypatch):
    model = adapted("llama")
    unpadded = Unpadded(model.get_base_model())
    monkeypatch.setattr("aletheia_lora.training.unpadded.labelled_loss", lambda *_: torch.tensor(float("nan")))
    batch = batch_of([4, 12])
    assert unpadded.batch(model, batch) is batch and "nan" in unpadded.turned_off


def test_everything_is_put_back():
    model = adapted("llama").train()
    config = model.get_base_model().config
    assert config._attn_implementation == "sdpa"
    unpadded = Unpadded(model.get_base_model())
    assert config._attn_implementation == ROW_BY_ROW
    unpadded.batch(model, batch_of([4, 12]))
    assert all(module.training for module in model.modules())
    unpadded.remove()
    assert config._attn_implementation == "sdpa"
    eager = build("llama")
    eager.set_attn_implementation("eager")
    assert Unpadded(eager).turned_off == "attention does not run as sdpa"
    assert isinstance(config, LlamaConfig) and random_batches(1)
