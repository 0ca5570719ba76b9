"""Layer scores of a packed base model against those of float32, and a round of training, saving and loading on it."""

import argparse
import gc
import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parents[1]
FORMATS = ("nf4", "nf4_double", "fp4", "int8", "torchao_int8", "hqq_int4", "hqq_int8", "gguf")
NUM_ROWS, MAX_LENGTH, SEED = 8, 256, 0
MIN_CORRELATION, MAX_OTHERS, MAX_LOGIT_DIFFERENCE = 0.95, 2, 1e-4


def load(name: str) -> Any:
    """The model in this format."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

    from aletheia_lora.embedded import _gguf_file, load_embedded_model
    from aletheia_lora.quantized import quantization_config

    if name == "gguf":
        file = _gguf_file()
        return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    if name.startswith("hqq"):
        return with_hqq(load_embedded_model()[0], int(name[-1]))
    if name == "float32":
        return load_embedded_model()[0]
    if name == "nf4_double":
        config: Any = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    elif name == "torchao_int8":
        from torchao.quantization import Int8WeightOnlyConfig

        config = TorchAoConfig(Int8WeightOnlyConfig())
    else:
        config = quantization_config(name, torch.float32)
    return load_embedded_model(packing={"quantization_config": config, "device_map": {"": "cpu"}})[0]


def with_hqq(model: Any, bits: int) -> Any:
    """Every linear map of the layers packed by HQQ itself: transformers 5.23 cannot load this format."""
    import torch
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    for layer in model.model.layers:
        for path, module in list(layer.named_modules()):
            if isinstance(module, torch.nn.Linear):
                parent, _, leaf = path.rpartition(".")
                config = BaseQuantizeConfig(nbits=bits, group_size=64)
                packed = HQQLinear(module, config, compute_dtype=torch.float32, device="cpu")
                setattr(layer.get_submodule(parent), leaf, packed.requires_grad_(False))
    return model


def measure(name: str, rows: Any, tokenizer: Any, reference: dict[int, float] | None) -> dict[str, Any]:
    """One format: its scores against the reference, its bytes, and the round of training, saving and loading."""
    from scipy.stats import spearmanr

    from aletheia_lora.memory import stored_bytes
    from aletheia_lora.plan_options import PlanOptions
    from aletheia_lora.planning import plan_from_probe
    from aletheia_lora.probing import probe_rows

    model = load(name)
    options = PlanOptions(probe_batches=NUM_ROWS, strategy="top_percent", rank=8, batch_size=2, seed=SEED)
    found, measured = probe_rows(model, rows, options, tokenizer=tokenizer)
    scores = {layer: float(score) for layer, score in measured.items()}
    half = len(scores) // 2
    best = set(sorted(scores, key=scores.get)[-half:])
    record = {
        "format": name,
        "storage": sorted({module.storage for module in found.modules}),
        "shapes": [[m.in_features, m.out_features] for m in found.layers[0].modules],
        "num_modules": len(found.modules),
        "methods": sorted({tensor.method for tensor in measured.tensors if tensor.adaptable}),
        "stored_bytes": stored_bytes(model),
        "num_params": found.num_params,
        "scores": [scores[layer] for layer in sorted(scores)],
    }
    if reference is not None:
        others = best - set(sorted(reference, key=reference.get)[-half:])
        ordered = sorted(scores)
        correlation = spearmanr([scores[k] for k in ordered], [reference[k] for k in ordered]).statistic
        record |= {"spearman": float(correlation), "others_in_half": len(others), "half": half}
        made = plan_from_probe(found, measured, options, model=model)
        assert made.prediction is not None
        record |= {"predicted_bytes": made.prediction.bytes, "memory_from": made.prediction.memory_from}
        record |= trained(name, model, made, rows, tokenizer)
    return record


def trained(name: str, model: Any, made: Any, rows: Any, tokenizer: Any) -> dict[str, Any]:
    """Train two steps, save, load by stock PEFT on a fresh base; the largest difference of the logits."""
    import torch
    import trl
    from peft import PeftModel

    from aletheia_lora.loss import evaluating
    from aletheia_lora.training.trainer import SFTTrainer

    with tempfile.TemporaryDirectory() as folder:
        args = trl.SFTConfig(
            output_dir=folder, max_steps=2, per_device_train_batch_size=2, learning_rate=1e-3, bf16=False,
            gradient_checkpointing=False, save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        trainer = SFTTrainer(model, args, plan=made, train_dataset=rows, processing_class=tokenizer)
        trainer.train()
        input_ids = torch.tensor([rows[0].input_ids])
        with evaluating(trainer.model):
            logits = trainer.model(input_ids=input_ids).logits
        trainer.model.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(load(name), folder)
        with evaluating(loaded):
            again = loaded(input_ids=input_ids).logits
            with loaded.disable_adapter():
                base = loaded(input_ids=input_ids).logits
    return {
        "dead_adapters": len(trainer.dead_adapters),
        "slow_adapters": sorted(set(trainer.slow_adapters.values())),
        "lowest_backward_layer": trainer.lowest_backward_layer,
        "lowest_layer": made.selection.lowest,
        "logit_difference": float((again - logits).abs().max() / logits.abs().max()),
        "logits_moved": float((logits - base).abs().max() / logits.abs().max()),
    }


def table(records: list[dict[str, Any]]) -> str:
    """The records as lines of a table."""
    lines = [
        "| format | MB stored | Spearman | other layers in the half | logits after loading | rule |",
        "| --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for record in records:
        if record.get("failed"):
            lines.append(f"| {record['format']} | | | | | failed: {record['failed']} |")
            continue
        size = f"{record['stored_bytes'] / 1e6:.0f}"
        if "spearman" not in record:
            lines.append(f"| {record['format']} | {size} | reference | | | |")
            continue
        lines.append(
            f"| {record['format']} | {size} | {record['spearman']:.4f} | {record['others_in_half']} of {record['half']}"
            f" | {record['logit_difference']:.1e} | {'holds' if holds(record) else 'FAILS'} |"
        )
    return "\n".join(lines)


def holds(record: dict[str, Any]) -> bool:
    """The rule, as the README fixed it."""
    return bool(
        record["spearman"] >= MIN_CORRELATION
        and record["others_in_half"] <= MAX_OTHERS
        and record["logit_difference"] <= MAX_LOGIT_DIFFERENCE
        and (record["storage"] == ["linear"] or record["methods"] == ["gram"])
        and record["dead_adapters"] == 0
    )


def run(data: Path, write: Callable[[dict[str, Any]], None], formats: list[str], done: list[dict[str, Any]]) -> None:
    """Every format that is not among the records yet, the float32 reference first."""
    from aletheia_lora.data import tokenize
    from aletheia_lora.embedded import load_embedded_model
    from aletheia_lora.rows import load_rows

    tokenizer = load_embedded_model()[1]
    given = [{"prompt": row["question"] + "\n", "completion": row["answer"]} for row in load_rows(str(data))[:NUM_ROWS]]
    rows = tokenize(given, tokenizer, max_length=MAX_LENGTH)
    reference = next((dict(enumerate(record["scores"])) for record in done if record["format"] == "float32"), None)
    names = {record["format"] for record in done}
    for name in (name for name in ("float32", *formats) if name not in names):
        print(name, file=sys.stderr, flush=True)
        try:
            record = measure(name, rows, tokenizer, reference)
            reference = reference or dict(enumerate(record["scores"]))
        except Exception as error:  # a failed format keeps its line
            record = {"format": name, "failed": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
        write(record)
        gc.collect()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="GSM8K's train.jsonl")
    parser.add_argument("--packages", type=Path, help="folder with torchao and hqq, if they are installed apart")
    parser.add_argument("--formats", nargs="*", default=list(FORMATS), choices=FORMATS)
    parser.add_argument("--print", action="store_true", help="print the table from the records and stop")
    arguments = parser.parse_args()
    if not arguments.print:
        if arguments.data is None:
            parser.error("--data is needed to run")
        sys.path.insert(0, str(CHECKOUT / "src"))
        if arguments.packages is not None:
            sys.path.append(str(arguments.packages))
        warnings.simplefilter("ignore")
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        from aletheia_lora.environment import environment

        with (HERE / "records.jsonl").open("a", encoding="utf-8") as stream:

            def write(record: dict[str, Any]) -> None:
                stream.write(json.dumps(record) + "\n")
                stream.flush()

            run(arguments.data, write, arguments.formats, read())
        packages = {name: version_of(name) for name in ("bitsandbytes", "torchao", "hqq", "gguf")}
        (HERE / "environment.json").write_text(json.dumps({**environment(), **packages}, indent=1) + "\n")
    print(table(read()))


def read() -> list[dict[str, Any]]:
    """The records so far; none yet is an empty list."""
    file = HERE / "records.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def version_of(package: str) -> str:
    """The installed version, or that there is none."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    main()
