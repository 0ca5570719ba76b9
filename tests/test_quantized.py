import importlib.util
import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import trl
from peft import PeftModel, get_peft_model
from peft.utils.integrations import dequantize_module_weight
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

from aletheia_lora.activations import without_contents
from aletheia_lora.adapter import attach, lora_config, shared_copy
from aletheia_lora.allocation import AllocationOptions, allocate
from aletheia_lora.anatomy import anatomy, is_quantized
from aletheia_lora.config import apply_aletheia_lora
from aletheia_lora.data import tokenize
from aletheia_lora.errors import ConfigError, PlanError, UnsupportedModelError
from aletheia_lora.loss import evaluating, heldout_loss, labelled_loss
from aletheia_lora.memory import memory_model, stored_bytes
from aletheia_lora.outlook import OutlookOptions, model_from_config, outlook
from aletheia_lora.planning import plan
from aletheia_lora.probe import gradient_probe, probe
from aletheia_lora.quantized import QUANTIZATIONS, gradients_kept, plain_tensors, quantization_config
from aletheia_lora.run_config import configuration
from aletheia_lora.runs import load_model, run_doctor, run_plan, run_probe, run_train
from aletheia_lora.training.trainer import SFTTrainer
from families import ROTARY, build, random_batches
from tiny_inputs import save_model, word_rows, word_tokenizer

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
every_format = pytest.mark.parametrize("name", list(QUANTIZATIONS))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A saved Llama whose matrices are as wide as a block of bitsandbytes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        wide = AutoModelForCausalLM.from_config(LlamaConfig(**{**ROTARY, "hidden_size": 64, "intermediate_size": 128}))
    return save_model(tmp_path_factory.mktemp("wide") / "wide-llama", wide)


@pytest.fixture(autouse=True)
def quiet(library_logging):
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


def packed(folder: Path, name: str | None, **more):
    config = {} if name is None else {"quantization_config": quantization_config(name, torch.float32)}
    return AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float32, **config, **more})


def unpacked(folder: Path, name: str):
    """A float32 model with the numbers that the packed one stands for."""
    plain, quantized = packed(folder, None), packed(folder, name)
    for path, module in quantized.named_modules():
        if type(module).__name__ in ("Linear4bit", "Linear8bitLt"):
            plain.get_submodule(path).weight.data = dequantize_module_weight(module).float()
    return plain


# --- what is in the model ---------------------------------------------------------------------------------------------


@needs_bitsandbytes
@every_format
def test_the_anatomy_of_a_packed_model_has_the_true_shapes_and_counts(folder, name):
    plain, found = anatomy(packed(folder, None)), anatomy(packed(folder, name))
    assert {module.storage for module in found.modules} == {"quantized"}
    assert [(m.name, m.in_features, m.out_features) for m in found.modules] == [
        (m.name, m.in_features, m.out_features) for m in plain.modules
    ]
    assert found.num_params == plain.num_params and found.left_out == plain.left_out
    assert [layer.num_params for layer in found.layers] == [layer.num_params for layer in plain.layers]


@needs_bitsandbytes
def test_bytes_are_counted_as_they_are_packed_scales_and_all(folder):
    weights = 4 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128)
    rows = 4 * (2 * 64 + 2 * 32 + 2 * 128 + 64)
    rest = stored_bytes(packed(folder, None)) - 4 * weights
    for name in ("nf4", "fp4"):  # a float32 scale for 64 weights, and the 16 values of the code for each matrix
        assert stored_bytes(packed(folder, name)) == rest + weights // 2 + 4 * weights // 64 + 4 * 16 * 28
    model = packed(folder, "int8")  # a float32 scale a row, wherever the library keeps it
    before = stored_bytes(model)
    heldout_loss(model, random_batches(1))
    assert before == stored_bytes(model) == rest + weights + 4 * rows
    config = BitsAndBytesConfig(**QUANTIZATIONS["nf4"], bnb_4bit_use_double_quant=True)
    double = packed(folder, None, quantization_config=config)
    scales = stored_bytes(double) - rest - weights // 2
    assert weights // 64 < scales < weights // 64 + 28 * 2000  # a byte for each scale, and the code of those bytes


@needs_bitsandbytes
def test_the_outlook_of_4_bit_weights_is_what_the_packed_model_takes(folder):
    options = OutlookOptions(batch_size=3, max_length=40, operations_per_second=1e9, memory_bytes=10**9)
    record = outlook(model_from_config(str(folder)), options)
    model = packed(folder, "nf4", dtype=torch.bfloat16)
    taken = memory_model(anatomy(model), num_rows=3, length=40, num_labelled=120, model=model)
    codes = 4 * 16 * 28  # of each matrix the 16 values of its code: nothing on a large model
    assert taken.weights - codes == pytest.approx(record["weights_bytes"]["4-bit"], rel=1e-3)
    for row in record["predictions"]:
        if row["weights"] == "4-bit" and row["depth"] == "uniform":
            expected = taken.step(range(4), rank=16, checkpointing=row["checkpointing"]) - taken.weights
            assert row["bytes"] - record["weights_bytes"]["4-bit"] == expected


@needs_bitsandbytes
@every_format
def test_activations_are_traced_through_packed_weights_at_the_shape_of_training(folder, name):
    plain, model = packed(folder, None), packed(folder, name)
    shape = {"num_rows": 3, "length": 40, "num_labelled": 60}
    expected = memory_model(anatomy(plain), model=plain, **shape)
    state = torch.get_rng_state()
    memory = memory_model(anatomy(model), model=model, **shape)
    assert torch.equal(torch.get_rng_state(), state)
    assert memory.activations == expected.activations == "traced"
    assert memory.weights == stored_bytes(model) < expected.weights
    assert memory.working - expected.working == 4 * 64 * 128  # one matrix unpacked
    for layer, of_plain in zip(memory.layers, expected.layers, strict=True):
        kept = layer.saved + layer.adapter_inputs
        assert kept == of_plain.saved + of_plain.adapter_inputs  # with adapters the inputs are kept in any case
        assert (layer.saved > of_plain.saved) == (name == "int8")  # bitsandbytes holds on to them without, too
    assert all(is_quantized(model.get_submodule(module.name)) for module in anatomy(model).modules)


def test_a_tensor_subclass_is_the_tensors_inside_it():
    inside = torch.ones(2, 3), torch.zeros(2, 3)
    assert [id(tensor) for tensor in plain_tensors(TwoTensor(*inside))] == [id(tensor) for tensor in inside]
    linear = nn.Linear(3, 2)
    assert not is_quantized(linear)
    linear.weight = nn.Parameter(TwoTensor(torch.ones(2, 3), torch.ones(2, 3)), requires_grad=False)
    assert not is_quantized(linear)
    linear.weight = nn.Parameter(linear.weight.a.to(torch.float8_e4m3fn), requires_grad=False)
    assert is_quantized(linear)


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
def test_torchao_weights_are_packed_ones(folder):
    torchao = pytest.importorskip("torchao.quantization")
    model, batches = packed(folder, None), random_batches(2)
    expected = dict(probe(model, batches))
    size = stored_bytes(model)
    torchao.quantize_(model.model.layers, torchao.Int8WeightOnlyConfig())
    found = anatomy(model)
    assert {module.storage for module in found.modules} == {"quantized"} and stored_bytes(model) < size / 2
    assert dict(probe(model, batches)) == pytest.approx(expected, rel=0.05)
    assert memory_model(found, model=model, num_rows=2, length=8, num_labelled=4).activations == "traced"


# --- probing ----------------------------------------------------------------------------------------------------------


@needs_bitsandbytes
@pytest.mark.parametrize(("name", "tolerance"), [("nf4", 1e-4), ("fp4", 1e-4), ("int8", 0.05)])  # int8 rounds inputs
def test_scores_are_those_of_the_numbers_that_the_packed_weights_stand_for(folder, name, tolerance):
    model, batches = packed(folder, name), random_batches(2)
    expected = probe(unpacked(folder, name), batches)
    for mode in ("auto", "exact", "gram"):
        found = probe(model, batches, mode=mode)
        assert dict(found) == pytest.approx(dict(expected), rel=tolerance)
        assert {tensor.method for tensor in found.tensors if tensor.adaptable} == {"gram"}
        assert all(tensor.weight_norm is None for tensor in found.tensors if tensor.adaptable)
    rows = [{"input_ids": batch["input_ids"][0].tolist()} for batch in batches]
    assert {t.method for t in gradient_probe(model, rows).tensors if t.adaptable} == {"gram"}


@needs_bitsandbytes
@every_format
def test_evaluation_leaves_packed_weights_trainable(folder, name):
    model, batches = packed(folder, name), random_batches(2)
    before = dict(probe(model, batches))
    first = heldout_loss(model, batches)
    assert dict(probe(model, batches)) == before and heldout_loss(model, batches) == first


@needs_bitsandbytes
def test_weights_that_were_repacked_for_inference_are_refused(folder):
    model = packed(folder, "nf4")
    model.model.layers[2].mlp.up_proj.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(UnsupportedModelError, match=r"repack .* Load the model anew"):
        probe(model, random_batches(1))


def test_the_librarys_own_settings_are_put_back():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].support_avx512bf16_for_cpu = True
    logger = logging.getLogger("bitsandbytes")
    logger.setLevel(logging.INFO)
    with pytest.raises(KeyError), gradients_kept(model):
        assert model[1].support_avx512bf16_for_cpu is False and not hasattr(model[0], "support_avx512bf16_for_cpu")
        assert logger.level == logging.ERROR
        raise KeyError
    assert model[1].support_avx512bf16_for_cpu is True and logger.level == logging.INFO


def test_the_librarys_log_level_is_put_back_in_whatever_order_runs_leave():
    logger = logging.getLogger("bitsandbytes")
    logger.setLevel(logging.INFO)
    first, second = gradients_kept(nn.Linear(2, 2)), gradients_kept(nn.Linear(2, 2))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert logger.level == logging.ERROR
    second.__exit__(None, None, None)
    assert logger.level == logging.INFO


class ForInference(nn.Module):
    """A linear map whose kernel knows no gradient, over a weight that PEFT does not know."""

    def __init__(self, linear, differentiable=False):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.differentiable = differentiable
        self.weight = nn.Parameter((linear.weight.detach() * 100).to(torch.int8), requires_grad=False)

    def forward(self, hidden):
        with torch.set_grad_enabled(self.differentiable and torch.is_grad_enabled()):
            return nn.functional.linear(hidden, self.weight.to(hidden.dtype) / 100)


def test_a_kernel_for_inference_is_refused_by_the_probe_and_not_taken_for_a_layer_without_gradient():
    model = build("llama")
    model.model.layers[1].mlp.up_proj = ForInference(model.model.layers[1].mlp.up_proj)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(UnsupportedModelError, match=r"no gradient passes model\.layers\.1\.mlp\.up_proj: its ForInf"):
        probe(model, random_batches(1))
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert not any(module._forward_hooks for module in model.modules())


# --- adapters ---------------------------------------------------------------------------------------------------------


def ranks_of(found, layers=(1, 3)):
    return allocate(found, layers, "uniform", AllocationOptions(rank=4))


def test_a_quantization_that_peft_does_not_know_is_an_error_and_the_model_is_given_back():
    model = build("llama")
    model.model.layers[3].mlp.down_proj = ForInference(model.model.layers[3].mlp.down_proj, differentiable=True)
    names = [name for name, _ in model.named_modules()]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    found = anatomy(model)
    assert len(probe(model, random_batches(1))) == 4
    with pytest.raises(PlanError, match=r"PEFT cannot put these adapters on LlamaForCausalLM: .*ForInference.*nf4"):
        attach(model, found, ranks_of(found))
    assert [name for name, _ in model.named_modules()] == names and not hasattr(model, "peft_config")
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert anatomy(model) == found


@needs_bitsandbytes
@every_format
def test_losses_and_gradients_on_a_packed_base_are_those_of_stock_peft(folder, name):
    batch = random_batches(1)[0]
    ours = packed(folder, name)
    found = anatomy(ours)
    adapted = attach(ours, found, ranks_of(found), seed=3).train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        stock = get_peft_model(packed(folder, name), lora_config(found, ranks_of(found))).train()
    losses = labelled_loss(adapted, batch), stock(**batch).loss
    torch.testing.assert_close(losses[0], losses[1])
    for loss in losses:
        loss.backward()
    gradients = [{n: p.grad for n, p in model.named_parameters() if p.grad is not None} for model in (adapted, stock)]
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) == 28
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][key], rtol=1e-4, atol=1e-7)  # float32
    config = apply_aletheia_lora(packed(folder, name), [1, 3], r=4, lora_alpha=8)
    assert set(config.target_modules) == {entry.name for entry in ranks_of(found)}


@needs_bitsandbytes
@every_format
def test_an_adapter_trained_on_a_packed_base_gives_the_same_logits_in_stock_peft(folder, name, tmp_path):
    rows, model = tokenize(word_rows(16), word_tokenizer()), packed(folder, name)
    made = plan(model, rows, tokenizer=word_tokenizer(), rank=4, probe_batches=2, time_budget=1.0, num_layers=2)
    assert made.prediction.memory_from == "traced" and "quantized" in str(made.to_dict())
    args = trl.SFTConfig(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=4, learning_rate=1e-2, bf16=False,
        gradient_checkpointing=False, save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True,
        eval_strategy="steps", eval_steps=1,
    )  # fmt: skip
    trainer = SFTTrainer(
        model, args, plan=made, train_dataset=rows, eval_dataset=rows, processing_class=word_tokenizer()
    )
    trainer.train()
    assert trainer.dead_adapters == [] and trainer.lowest_backward_layer == made.selection.lowest
    input_ids = random_batches(1)[0]["input_ids"]
    with evaluating(trainer.model):
        logits = trainer.model(input_ids=input_ids).logits
    trainer.model.save_pretrained(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(packed(folder, name), str(tmp_path / "adapter"))
    with evaluating(loaded):
        torch.testing.assert_close(loaded(input_ids=input_ids).logits, logits, rtol=1e-5, atol=1e-6)
        with loaded.disable_adapter():
            assert not torch.allclose(loaded(input_ids=input_ids).logits, logits, rtol=1e-3)


@needs_bitsandbytes
@every_format
def test_copies_share_packed_weights_also_of_a_model_that_never_ran(folder, name):
    model, batches = packed(folder, name), random_batches(1)
    size = stored_bytes(model)
    twins = [shared_copy(model), shared_copy(model)]
    assert stored_bytes(nn.ModuleList([model, *twins])) == size
    expected = heldout_loss(packed(folder, name), batches)
    assert [heldout_loss(one, batches) for one in (*twins, model)] == [expected] * 3
    assert stored_bytes(nn.ModuleList([model, *twins])) == size


def test_a_twin_without_contents_leaves_plain_models_as_they_are():
    model = build("gpt2")
    twin, _ = without_contents(model)
    assert [type(module) for module in twin.modules()] == [type(module) for module in model.modules()]


def test_weights_in_float8_are_read_when_loaded(monkeypatch):
    model = nn.Linear(64, 64)
    model.weight = nn.Parameter(model.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    monkeypatch.setattr("aletheia_lora.runs._load_by_name", lambda *_args, **_kwargs: (model, None))
    assert load_model(configuration({"model": "any", "device": "cpu"}), lambda _line: None)[0] is model


# --- the command ------------------------------------------------------------------------------------------------------


def test_an_unknown_quantization_and_a_missing_library_say_what_to_do(monkeypatch):
    with pytest.raises(ConfigError, match=r"unknown quantization 'nf5'\. Did you mean 'nf4'"):
        quantization_config("nf5")
    with pytest.raises(ConfigError, match=r"quantization='int4': input should be 'nf4', 'fp4' or 'int8'"):
        configuration({"quantization": "int4"})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs bitsandbytes, which is not installed\. Run `pip install bitsand"):
        quantization_config("nf4")


@needs_bitsandbytes
def test_the_commands_load_the_base_packed(folder, tmp_path, data):
    common = {"model": str(folder), "data": data, "quantization": "nf4", "device": "cpu", "probe_batches": 2}
    said = []
    assert run_doctor(configuration({**common}), said.append)["storage"] == {"quantized": 28}
    record = run_probe(configuration({**common, "validation_rows": 4}), said.append)
    assert {t["method"] for t in record["tensors"] if t["kind"] != "other"} == {"gram"}
    made = run_plan(
        configuration({**common, "validation_rows": 4, "rank": 4, "output": tmp_path / "plan.json"}), said.append
    )
    assert made["prediction"]["memory_from"] == "traced"
    trained = run_train(
        configuration(
            {**{k: v for k, v in common.items() if k != "probe_batches"}, "validation_rows": 4, "steps": 2,
             "plan": tmp_path / "plan.json", "output": tmp_path / "adapter"}
        ),
        said.append,
    )  # fmt: skip
    assert trained["dead_adapters"] == [] and json.loads((tmp_path / "adapter" / "record.json").read_text())


@needs_bitsandbytes
def test_a_checkpoint_that_is_quantized_already_is_not_quantized_again(folder, tmp_path):
    packed(folder, "int8").save_pretrained(tmp_path / "packed")
    word_tokenizer().save_pretrained(tmp_path / "packed")
    config = {"model": str(tmp_path / "packed"), "device": "cpu"}
    with pytest.raises(ConfigError, match="is quantized already"):
        load_model(configuration({**config, "quantization": "nf4"}), lambda _line: None)
    model, _ = load_model(configuration(config), lambda _line: None)
    assert {module.storage for module in anatomy(model).modules} == {"quantized"}


def said_to_be_packed(method):
    """A model as transformers loads it from a format that it does not train."""
    model = build("llama")
    model.is_quantized = True
    model.hf_quantizer = SimpleNamespace(
        is_trainable=False, is_qat_trainable=False, quantization_config=SimpleNamespace(quant_method=method)
    )
    return model


def trainer_for(model, folder):
    rows = tokenize(word_rows(12), word_tokenizer())
    made = plan(model, rows, tokenizer=word_tokenizer(), rank=4, probe_batches=2)
    settings = {"use_cpu": True, "bf16": False, "report_to": [], "max_steps": 2, "logging_steps": 1}
    args = trl.SFTConfig(output_dir=str(folder), **settings)
    return made, SFTTrainer(model, args, plan=made, train_dataset=rows, processing_class=word_tokenizer())


def test_a_format_that_transformers_does_not_train_is_refused_and_the_model_given_back(tmp_path):
    model, before = said_to_be_packed("awq"), anatomy(build("llama"))
    with pytest.raises(UnsupportedModelError, match=r"does not train models that it loaded from awq\. Load"):
        trainer_for(model, tmp_path)
    assert anatomy(model) == before and all(parameter.requires_grad for parameter in model.parameters())


def test_a_gguf_file_is_unpacked_while_loading_and_trains_like_any_model(tmp_path):
    losses = []
    for model in (build("llama"), said_to_be_packed("gguf")):
        said = getattr(model, "is_quantized", None)
        _, trainer = trainer_for(model, tmp_path)
        trainer.train()
        assert getattr(model, "is_quantized", None) == said
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == losses[1] and len(losses[0]) == 2
