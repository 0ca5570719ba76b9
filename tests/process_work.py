"""What the processes of tests/test_processes.py do, run as a script by each; rank 0 writes each outcome.

``python process_work.py JOB,JOB,... FOLDER [ENGINE]`` in the environment that a launcher makes (RANK, WORLD_SIZE, ...).
"""

import json
import os
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import trl
from accelerate import PartialState
from accelerate.utils import DistributedType

from aletheia_lora import processes
from aletheia_lora.data import batches, tokenize
from aletheia_lora.errors import DataError
from aletheia_lora.planning import plan
from aletheia_lora.probe import probe
from aletheia_lora.training.engine import whole_adapters
from aletheia_lora.training.run import TrainOptions, train_adapter
from aletheia_lora.training.trainer import SFTTrainer
from families import build
from tiny_inputs import word_rows, word_tokenizer

STEPS = 5


def rows(seed=0):
    return tokenize(word_rows(24, seed), word_tokenizer())


def made_plan(**options):
    choice = {"strategy": "last", "num_layers": 2, "rank": 4, "allocation": "uniform", "probe_batches": 3}
    return plan(build("llama"), rows(), tokenizer=word_tokenizer(), **{**choice, **options})


def error_of(work):
    """The error that every process raised, in words; what happens if none did is an error, too."""
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


# --- jobs: each runs in one process or in several, and gives what should be the same ------------------------------


def probe_job(_folder):
    measured = probe(build("llama"), list(batches(list(rows())[:10], 2, 0)), taylor=True, descent=True, kernels=True)
    few = probe(build("llama"), list(batches(list(rows())[:1], 1, 0)))
    made = made_plan(strategy="budget", time_budget=1.0, num_layers=None, calibrate=True)
    return {"probe": measured.to_dict(), "few": few.to_dict(), "plan": made.to_dict()}


def errors_job(folder):
    rank = processes.rank()

    def broken():
        if rank == 1:
            raise DataError("row 7 is broken")

    def foreign():
        if rank == 0:
            raise KeyError("no such thing")

    def nan_on_one():
        some = list(batches(list(rows())[:4], 1, 0))
        model = build("llama")
        if rank == 1:
            model.model.layers[2].register_forward_hook(lambda _module, _args, output: output * float("nan"))
        probe(model, some)

    def other_model():
        model = build("llama")
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight += rank
        probe(model, list(batches(list(rows())[:4], 1, 0)))

    def other_shape():
        probe(build(("llama", "gpt2")[rank]), list(batches(list(rows())[:4], 1, 0)))

    def other_rows():
        probe(build("llama"), list(batches(list(rows(seed=rank))[:4], 1, 0)))

    def unreadable_rows():
        plan(build("llama"), word_rows(8) if rank == 0 else [], tokenizer=word_tokenizer())

    found = {work.__name__: error_of(work) for work in (nan_on_one, other_model, other_shape, other_rows)}
    found["foreign"] = error_of(lambda: processes.gather(foreign, "looking"))
    found["broken"] = error_of(lambda: processes.gather(broken, "reading"))
    uniform, wider = made_plan(), made_plan(rank=8)
    found["other_plan"] = error_of(lambda: trainer((uniform, wider)[rank], folder))
    found["unreadable_rows"] = error_of(unreadable_rows)
    return found


def train_job(folder, **changes):
    made = made_plan()
    ours = trainer(made, folder, **changes)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ours.train()
    weights = whole_adapters(ours.model)
    if weights is None:
        weights = {name: p.detach() for name, p in ours.model.named_parameters() if p.requires_grad}
    return {
        "weights": {name: weights[name].flatten().tolist() for name in sorted(weights)},
        "losses": [entry["loss"] for entry in ours.state.log_history if "loss" in entry],
        "engine": ours.engine.name,
        "limits": ours.engine_limits,
        "lowest_backward_layer": ours.lowest_backward_layer,
        "dead_adapters": ours.dead_adapters,
        "slow_adapters": ours.slow_adapters,
        "padding": ours.padding_record,
        "warnings": [str(warning.message) for warning in caught if "ZeRO-3" in str(warning.message)],
    }


def trainer(made, folder, **changes):
    model = build("llama")  # first: once there are arguments for ZeRO-3, every new model comes in parts
    size = 8 // processes.world_size()
    settings = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": size,
        "learning_rate": 1.0,
        "max_grad_norm": 1.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": "ACCELERATE_TORCH_DEVICE" not in os.environ,
        "ddp_backend": "gloo" if "ACCELERATE_TORCH_DEVICE" in os.environ else None,
        "seed": 3,
        "gradient_checkpointing": False,
        "bf16": False,
        "optim": "sgd",
        **changes,
    }
    args = trl.SFTConfig(**settings)
    return SFTTrainer(model, args, plan=made, train_dataset=rows(), processing_class=word_tokenizer())


def accumulate_job(folder):
    size = 8 // processes.world_size() // 2
    return train_job(folder, per_device_train_batch_size=size, gradient_accumulation_steps=2)


def checkpointing_job(folder):
    return train_job(folder, gradient_checkpointing=True)


def nan_job(folder):
    """A loss that is not finite on one process stops all of them."""
    ours = trainer(made_plan(), folder, gradient_accumulation_steps=2)
    if processes.rank() == 1:
        ours.model.get_base_model().model.norm.register_forward_hook(lambda _m, _args, output: output * float("nan"))
    return error_of(ours.train)


def folder_job(folder):
    record = train_adapter(
        build("llama"),
        word_tokenizer(),
        made_plan(),
        rows(),
        folder / "adapter",
        TrainOptions(steps=2, batch_size=2, learning_rate=1e-2),
    )
    again = error_of(
        lambda: train_adapter(build("llama"), word_tokenizer(), made_plan(), rows(), folder / "adapter", TrainOptions())
    )
    return {"engine": record["engine"], "again": again}


def act_as(engine):
    """Let accelerate run this engine on the CPU, which it offers for accelerators only."""
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    kind = DistributedType.MULTI_XPU if engine == "FSDP2" else DistributedType.NO
    PartialState._prepare_backend = lambda *_args, **_kwargs: ("gloo", kind)
    if engine == "FSDP2":
        os.environ |= {
            "ACCELERATE_USE_FSDP": "true",
            "FSDP_VERSION": "2",
            "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
            "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
            "FSDP_RESHARD_AFTER_FORWARD": "true",
        }
    else:
        os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": engine[-1]}


def main(jobs, folder, engine="DDP"):
    torch.set_num_threads(1)
    if engine != "DDP":
        act_as(engine)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("gloo")
    for job in jobs.split(","):
        outcome = globals()[f"{job}_job"](Path(folder))
        told = processes.gather(lambda outcome=outcome: outcome, "telling")
        if processes.is_main():
            (Path(folder) / f"{job}.json").write_text(json.dumps(told))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
