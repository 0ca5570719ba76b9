import pytest
import torch

from aletheia_lora.errors import DataError
from aletheia_lora.loss import heldout_loss, labelled_loss
from families import CONFIGS, build, random_batches


@pytest.mark.parametrize("family", CONFIGS)
def test_the_loss_is_the_models_own_for_every_head(family):
    model = build(family).eval()
    batch = random_batches(1)[0]
    with torch.no_grad():
        ours = labelled_loss(model, batch)
        theirs = model(**batch, use_cache=False).loss
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)  # float32


def test_the_head_sees_labelled_positions_only():
    model = build("llama")
    seen = []
    handle = model.lm_head.register_forward_hook(lambda module, args, output: seen.append(args[0].shape))
    batch = random_batches(1)[0]
    labelled_loss(model, batch)
    handle.remove()
    assert seen == [(1, int((batch["labels"][:, 1:] != -100).sum()), 32)]
    assert not model.lm_head._forward_pre_hooks


def test_a_batch_without_labels_has_no_loss():
    batch = random_batches(1)[0]
    batch["labels"] = torch.full_like(batch["labels"], -100)
    with pytest.raises(DataError, match="no labelled token"):
        labelled_loss(build("llama"), batch)


def test_held_out_loss_weighs_tokens_not_batches_and_keeps_the_modes():
    model = build("gpt2").train()
    model.transformer.h[1].eval()
    modes = [module.training for module in model.modules()]
    small, large = random_batches(1, rows=1, length=6)[0], random_batches(1, rows=3, length=20, seed=1)[0]
    together = heldout_loss(model, [small, large])
    weights = [int((batch["labels"][:, 1:] != -100).sum()) for batch in (small, large)]
    apart = [heldout_loss(model, [batch]) for batch in (small, large)]
    expected = sum(w * loss for w, loss in zip(weights, apart, strict=True)) / sum(weights)
    assert together == pytest.approx(expected, rel=1e-6)
    assert [module.training for module in model.modules()] == modes
