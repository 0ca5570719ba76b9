import pytest
import torch
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GraniteConfig

from aletheia_lora import loss
from aletheia_lora.errors import DataError
from aletheia_lora.loss import all_at_once, heldout_loss, labelled_loss
from families import CONFIGS, ROTARY, build, random_batches

REWORKED = {
    "capped": lambda: Gemma2Config(**ROTARY, head_dim=8, final_logit_softcapping=2.0),
    "scaled": lambda: CohereConfig(**ROTARY, logit_scale=0.3),
    "divided": lambda: GraniteConfig(**ROTARY, logits_scaling=3.0),
}


def frozen(model):
    """The model with frozen weights in eval mode; ``inputs_seen`` fills with its embeddings, which want gradients."""
    model.eval().requires_grad_(False)
    model.inputs_seen = []

    def wants_gradient(_module, _args, output):
        model.inputs_seen.append(output.requires_grad_(True))

    model.get_input_embeddings().register_forward_hook(wants_gradient)
    return model


@pytest.mark.parametrize("family", CONFIGS)
def test_the_loss_is_the_models_own_for_every_head(family):
    model = build(family).eval()
    batch = random_batches(1)[0]
    with torch.no_grad():
        ours = labelled_loss(model, batch)
        theirs = model(**batch, use_cache=False).loss
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)  # float32


@pytest.mark.parametrize("family", CONFIGS)
def test_gradients_are_those_of_the_whole_logits(family, monkeypatch):
    monkeypatch.setitem(loss.LOGIT_BYTES, "cpu", 4 * 256 * 5)  # five positions at a time
    model = frozen(build(family))
    batch = random_batches(1)[0]

    def gradient(value):
        (found,) = torch.autograd.grad(value, model.inputs_seen[-1])
        return found

    theirs = gradient(model(**batch, use_cache=False).loss)
    for call in ("first, which looks at what the model does to its logits", "later"):
        ours = gradient(labelled_loss(model, batch))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6, msg=lambda text, call=call: f"{call}: {text}")


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_is_as_near_to_float32_as_the_whole_logits_are(autocast):
    exact = build("llama")
    coarse = frozen(build("llama") if autocast else build("llama", torch.bfloat16))
    batch = random_batches(1)[0]
    truth = exact(**batch, use_cache=False).loss.detach()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        ours = labelled_loss(coarse, batch)
        theirs = coarse(**batch, use_cache=False).loss
    assert ours.dtype == torch.float32
    assert abs(ours - truth) <= 2 * abs(theirs - truth) + 1e-3  # bfloat16 has 8 bits
    ours.backward()


def test_no_logits_but_one_position_are_made():
    model = frozen(build("llama"))
    seen = []
    handle = model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    labelled_loss(model, random_batches(1)[0])
    handle.remove()
    assert seen == [(1, 1, 256)]
    assert not model.lm_head._forward_pre_hooks and not model.lm_head._forward_hooks


def test_a_model_that_reworks_its_logits_runs_twice_once_and_draws_the_same_dropout():
    model = frozen(build("gpt2")).train()
    plain_forward, runs = model.forward, []

    def capped(*args, **kwargs):
        runs.append(1)
        output = plain_forward(*args, **kwargs)
        output.logits = 5 * torch.tanh(output.logits / 5)
        return output

    model.forward = capped
    batch = random_batches(1)[0]
    losses = []
    for _ in range(2):
        torch.manual_seed(3)
        losses.append(labelled_loss(model, batch).item())
    assert losses[0] == losses[1]
    assert len(runs) == 3
    assert all_at_once(model) == "the model reworks its logits in a way that is not known"
    torch.manual_seed(3)
    labels = batch.pop("labels")
    logits = capped(**batch).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert losses[0] == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", REWORKED)
def test_capped_and_scaled_logits_are_made_a_few_at_a_time(kind, dtype, monkeypatch):
    monkeypatch.setitem(loss.LOGIT_BYTES, "cpu", 4 * 256 * 5)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = frozen(AutoModelForCausalLM.from_config(REWORKED[kind]()))
    model.get_output_embeddings().weight.data *= 20  # logits that a cap bends
    batch, positions = random_batches(1)[0], []

    def found(value):
        (gradient,) = torch.autograd.grad(value, model.inputs_seen[-1])
        return value.detach(), gradient.float()

    truth, true_gradient = found(model(**batch, use_cache=False).loss)  # float32
    model.to(dtype)
    model.lm_head.register_forward_hook(lambda module, args, output: positions.append(output.shape[:-1].numel()))
    for runs in (2, 3):
        ours, gradient = found(labelled_loss(model, batch))
        assert positions == [1] * runs and all_at_once(model) is None
        coarse = dtype == torch.bfloat16
        torch.testing.assert_close(ours, truth, rtol=2e-2 if coarse else 1e-6, atol=0)
        difference = (gradient - true_gradient).norm() / true_gradient.norm()
        assert difference < (5e-2 if coarse else 1e-5)


def test_a_cap_that_changes_is_found_anew():
    model, batch = frozen(build("gemma2")), random_batches(1)[0]
    model.get_output_embeddings().weight.data *= 20
    for cap in (30.0, 3.0):
        model.config.final_logit_softcapping = cap
        expected = model(**batch, use_cache=False).loss
        torch.testing.assert_close(labelled_loss(model, batch), expected, rtol=1e-6, atol=0)
        assert all_at_once(model) is None


def test_what_keeps_all_labelled_logits_alive_is_named():
    model = build("llama")
    assert all_at_once(model) == "the head trains" and all_at_once(model, frozen=True) is None
    model.lm_head = type("PackedLinear", (torch.nn.Linear,), {})(32, 256, bias=False)
    assert all_at_once(model, frozen=True) == "the head runs as PackedLinear and not as a plain Linear"


class OnAnotherDevice(torch.Tensor):
    """A number that can be moved and, until then, be used for nothing."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is not torch.Tensor.to:
            raise RuntimeError("Expected all tensors to be on the same device")
        return torch.tensor(4.0)


@pytest.mark.parametrize("family", ["llama", "gemma2"])  # the loss at the head, and of what the model gives out
def test_the_number_of_labels_may_be_on_the_device_of_the_batch(family):
    model, batch = build(family).eval(), random_batches(1)[0]
    expected = labelled_loss(model, batch, num_labels=4)
    found = labelled_loss(model, batch, num_labels=torch.tensor(4).as_subclass(OnAnotherDevice))
    assert found.item() == expected.item()


def test_a_head_with_a_bias(monkeypatch):
    monkeypatch.setitem(loss.LOGIT_BYTES, "cpu", 4 * 256 * 5)
    model = frozen(build("llama"))
    model.lm_head.bias = torch.nn.Parameter(torch.linspace(-2, 2, 256), requires_grad=False)
    batch = random_batches(1)[0]
    expected = model(**batch, use_cache=False).loss
    torch.testing.assert_close(labelled_loss(model, batch), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_changes_nothing_and_the_mask_is_passed_on_only_where_it_says_something(family, side):
    model, batch = frozen(build(family)), random_batches(1)[0]
    if side == "left":
        batch = {key: value.flip(1) for key, value in batch.items()}
        batch["labels"][:, -2:] = batch["input_ids"][:, -2:]
    masks = []
    handle = model.get_decoder().register_forward_hook(
        lambda module, args, kwargs, output: masks.append(kwargs["attention_mask"]), with_kwargs=True
    )
    ours = labelled_loss(model, batch)
    handle.remove()
    assert masks and all((mask is None) is (side == "right") for mask in masks)
    torch.testing.assert_close(ours, model(**batch, use_cache=False).loss, rtol=1e-5, atol=1e-6)


def test_a_head_that_trains_gets_its_gradient():
    model = build("llama")
    labelled_loss(model, random_batches(1)[0]).backward()
    ours = model.lm_head.weight.grad.clone()
    model.zero_grad()
    model(**random_batches(1)[0], use_cache=False).loss.backward()
    torch.testing.assert_close(ours, model.lm_head.weight.grad)


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
