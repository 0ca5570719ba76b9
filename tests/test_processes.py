"""Two processes on the CPU, talking by gloo: each job of process_work.py is run by one process and by two, once."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from accelerate.commands.config.config_args import load_config_from_file
from peft import PeftModel

from aletheia_lora import processes
from aletheia_lora.data import batches, tokenize
from aletheia_lora.errors import ConfigError, ProbeError
from aletheia_lora.planning import plan
from aletheia_lora.probe import probe
from aletheia_lora.probe_result import ProbeResult
from aletheia_lora.training.engine import check_engine
from aletheia_lora.training.run import TrainOptions, train_adapter
from families import build
from tiny_inputs import save_model, save_rows, word_rows, word_tokenizer

WORK = Path(__file__).with_name("process_work.py")
PATIENCE_SECONDS = 300
"""A group that waits for itself is ended after this; nothing here takes a tenth of it on an idle machine."""


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def launch(arguments, num_processes, folder):
    """Run ``python arguments`` in so many processes; their outputs. All are ended if one takes too long."""
    port = str(free_port())
    folder.mkdir(parents=True, exist_ok=True)
    started = []
    try:
        for rank in range(num_processes):
            environment = {
                **os.environ,
                "PYTHONPATH": os.pathsep.join([str(WORK.parent), *sys.path]),
                "OMP_NUM_THREADS": "1",
                "CUDA_VISIBLE_DEVICES": "",
                "HF_HUB_OFFLINE": "1",
            }
            if num_processes > 1:
                environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(num_processes)}
                environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(num_processes)}
            with (folder / f"out.{rank}").open("w") as out, (folder / f"err.{rank}").open("w") as err:
                command = [sys.executable, *map(str, arguments)]
                started.append(subprocess.Popen(command, env=environment, stdout=out, stderr=err))
        for process in started:
            process.wait(timeout=PATIENCE_SECONDS)
    finally:
        for process in started:
            process.kill()
            process.wait()
    return [
        (process.returncode, (folder / f"out.{rank}").read_text(), (folder / f"err.{rank}").read_text())
        for rank, process in enumerate(started)
    ]


JOBS = {
    (1, "DDP"): ("probe", "train", "accumulate", "checkpointing"),
    (2, "DDP"): ("probe", "errors", "train", "accumulate", "checkpointing", "nan", "folder"),
    (2, "FSDP2"): ("train", "checkpointing"),
    (2, "ZeRO-2"): ("train",),
    (2, "ZeRO-3"): ("train",),  # alone: later models of the same process would come in parts
}
"""What is run in so many processes under an engine, all by one launch: starting takes longer than running."""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """``run(job, num_processes, engine)``: what each process told of it; every launch is done once in this module."""
    known = {}

    def once(job, num_processes=2, engine="DDP"):
        key = (num_processes, engine)
        if key not in known:
            known[key] = folder = tmp_path_factory.mktemp(f"{num_processes}-{engine}")
            for code, _, errors in launch([WORK, ",".join(JOBS[key]), folder, engine], num_processes, folder):
                assert code == 0, errors[-3000:]
        return json.loads((known[key] / f"{job}.json").read_text())

    return once


# --- the probe ----------------------------------------------------------------------------------------------------


def test_two_processes_probe_as_one_and_all_get_the_same(run):
    (alone,), (first, second) = run("probe", 1), run("probe")
    assert first == second
    one, two = ProbeResult.from_dict(alone["probe"]), ProbeResult.from_dict(first["probe"])
    assert two.num_batches == 5 and two.num_tokens == one.num_tokens and two.fingerprint == one.fingerprint
    assert two.num_labelled_tokens == one.num_labelled_tokens
    np.testing.assert_allclose(two.losses, one.losses, rtol=1e-5)
    np.testing.assert_allclose(two.batch_scores(), one.batch_scores(), rtol=1e-5)
    np.testing.assert_allclose(two.standard_errors(), one.standard_errors(), rtol=1e-5)
    assert [tensor.name for tensor in two.tensors] == [tensor.name for tensor in one.tensors]
    assert [tensor.method for tensor in two.tensors] == [tensor.method for tensor in one.tensors]
    for left, right in zip(two.tensors, one.tensors, strict=True):
        assert (left.taylor is None) == (right.taylor is None)
        np.testing.assert_allclose(left.taylor or (), right.taylor or (), rtol=1e-5)
        assert (left.descent is None) == (right.descent is None)
        assert left.descent is None or left.descent == pytest.approx(right.descent, rel=1e-5)
    np.testing.assert_allclose(two.kernels, one.kernels, rtol=1e-4, atol=1e-6 * np.max(one.kernels))
    assert two.timing is not None and one.timing is not None
    assert two.timing.lengths == one.timing.lengths and len(two.timing.forward) == 5
    assert (two.timing.num_first, one.timing.num_first) == (2, 1)


def test_a_process_without_a_batch_of_its_own_gets_the_result_of_the_others(run):
    (alone,), (first, second) = run("probe", 1), run("probe")
    assert first["few"] == second["few"]
    np.testing.assert_allclose(first["few"]["scores"], alone["few"]["scores"], rtol=1e-5)
    assert len(first["few"]["losses"]) == 1


def test_all_processes_get_one_plan_that_chooses_as_one_process_does(run):
    (alone,), (first, second) = run("probe", 1), run("probe")
    assert first["plan"] == second["plan"]
    for layer, score in alone["plan"]["scores"].items():
        assert first["plan"]["scores"][layer] == pytest.approx(score, rel=1e-5)


def test_an_error_on_one_process_is_raised_by_all(run):
    first, second = run("errors")
    assert second["broken"] == "DataError: row 7 is broken"
    assert first["broken"] == "DataError: process 1 of 2 failed while reading: row 7 is broken"
    assert first["nan_on_one"].startswith("ProbeError: process 1 of 2 failed while probing: the loss is nan on batch 1")
    assert second["nan_on_one"].startswith("ProbeError: the loss is nan on batch 1; layer 2 is the first")
    assert second["foreign"] == "ProcessError: process 0 of 2 failed while looking: KeyError('no such thing')"
    assert "DataError" in first["unreadable_rows"] and "DataError" in second["unreadable_rows"]


@pytest.mark.parametrize(
    ("work", "what"), [("other_model", "weights"), ("other_shape", "model"), ("other_rows", "batches")]
)
def test_processes_that_hold_different_things_are_told_so(run, work, what):
    for outcome in run("errors"):
        assert outcome[work].startswith(f"ProcessError: the processes do not hold the same {what}: process 0 has ")
        assert outcome[work].endswith("Load one model, and draw the same rows with the same seed, on every process.")


def test_processes_that_would_train_by_different_plans_are_told_so(run):
    for outcome in run("errors"):
        assert outcome["other_plan"].startswith("ProcessError: the processes do not hold the same plan")


def test_without_a_group_there_is_one_process_and_errors_stay_what_they_are():
    assert (processes.rank(), processes.world_size(), processes.is_main()) == (0, 1, True)
    assert processes.gather(lambda: 3, "counting") == [3] and processes.on_main(lambda: 4, "counting") == 4
    assert processes.on_any(torch.tensor(True)) and not processes.on_any(False)
    processes.check_same(lambda: pytest.fail("nothing to compare with"), "")
    with pytest.raises(KeyError):
        processes.gather(lambda: {}["key"], "reading")


# --- training -----------------------------------------------------------------------------------------------------


def check_engine_trains_as_one_process(run, job, engine):
    (alone,), together = run(job, 1), run(job, 2, engine)
    assert max(abs(value) for name, values in alone["weights"].items() if "lora_B" in name for value in values) > 0.01
    for outcome in together:
        assert outcome["engine"] == engine and outcome["lowest_backward_layer"] == 2
        assert outcome["losses"] == pytest.approx(alone["losses"], abs=1e-5)
    for name, values in alone["weights"].items():
        np.testing.assert_allclose(together[0]["weights"][name], values, atol=1e-5)
    return together[0]


@pytest.mark.parametrize(
    ("job", "engine"), [(job, key[1]) for key in list(JOBS)[1:3] for job in JOBS[key] if job in JOBS[1, "DDP"][1:]]
)
def test_adapters_are_those_of_one_process_on_the_same_global_batch(run, job, engine):
    outcome = check_engine_trains_as_one_process(run, job, engine)
    assert outcome["dead_adapters"] == [] and outcome["slow_adapters"] == {}
    if engine == "DDP":
        assert outcome["limits"] == {} and outcome["padding"]["turned_off"] is None
        assert outcome["padding"]["num_padding"] > 0
    else:
        assert set(outcome["limits"]) == {"padding"}
        assert outcome["padding"]["turned_off"] == outcome["limits"]["padding"]


@pytest.mark.slow  # DeepSpeed compiles a library when it first runs
@pytest.mark.parametrize("stage", [2, 3])
def test_zero_trains_as_one_process_and_says_what_it_takes_away(run, stage):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    outcome = check_engine_trains_as_one_process(run, "train", f"ZeRO-{stage}")
    assert outcome["dead_adapters"] is None and "dead_adapters" in outcome["limits"]
    if stage == 2:
        assert set(outcome["limits"]) == {"dead_adapters"} and outcome["padding"]["num_padding"] > 0
    else:
        assert {"padding", "fast_adapters", "labelled_logits"} <= set(outcome["limits"])
        assert len(outcome["slow_adapters"]) == 14
    assert "truncation" not in outcome["limits"] and outcome["warnings"] == []


def test_a_loss_that_is_not_finite_on_one_process_stops_all(run):
    first, second = run("nan")
    assert first.startswith("NonFiniteLossError: the loss of step 1 is not finite on another process")
    assert second.startswith("NonFiniteLossError: the loss of step 1 is nan")


def test_one_process_writes_the_folder_and_a_full_one_is_refused_by_all(run):
    for outcome in run("folder"):
        assert outcome["engine"] == {"name": "DDP", "num_processes": 2, "limits": {}}
        assert outcome["again"].startswith("OutputError") and "is not an empty folder" in outcome["again"]


def test_several_gpus_in_one_process_are_refused_with_the_way_out():
    args = type("Arguments", (), {"n_gpu": 2})()
    with pytest.raises(ConfigError, match="accelerate launch"):
        check_engine(args, build("llama"))


# --- weights on several devices, or in no memory until they are used ----------------------------------------------


def spread(tmp_path, *, disk):
    """A model with two layers offloaded to disk, or with all of it in a state dict, as accelerate leaves them."""
    model = build("llama")
    if not disk:
        return cpu_offload(model, execution_device=torch.device("cpu"))
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "disk"}
    places |= {f"model.layers.{layer}": "disk" if layer % 2 else "cpu" for layer in range(4)}
    return dispatch_model(model, places, main_device="cpu", offload_dir=str(tmp_path / "offload"), force_hooks=True)


@pytest.mark.parametrize("disk", [False, True], ids=["memory", "disk"])
def test_a_model_with_offloaded_weights_is_planned_as_a_whole_one_and_not_trained(tmp_path, disk):
    rows = tokenize(word_rows(24), word_tokenizer())
    drawn = list(batches(list(rows)[:4], 2, 0))
    model = spread(tmp_path, disk=disk)
    assert model.model.layers[1].mlp.up_proj.weight.device.type == "meta"
    flags = {name: (p.requires_grad, p.device.type) for name, p in model.named_parameters()}
    whole, parted = probe(build("llama"), drawn, taylor=True), probe(model, drawn, taylor=True)
    assert {name: (p.requires_grad, p.device.type) for name, p in model.named_parameters()} == flags
    for left, right in zip(whole.tensors, parted.tensors, strict=True):
        assert left.name == right.name and left.method == right.method
        np.testing.assert_allclose(right.grad_norm, left.grad_norm, rtol=1e-5)
        np.testing.assert_allclose(right.taylor, left.taylor, rtol=1e-5)
        assert right.weight_norm == pytest.approx(left.weight_norm, rel=1e-6)
    made = plan(model, rows, strategy="last", num_layers=2, rank=4, allocation="uniform", probe_batches=2)
    assert made.scores == pytest.approx(plan(build("llama"), rows, probe_batches=2).scores, rel=1e-5)
    with pytest.raises(ConfigError, match=r"weights are offloaded, e\.g\. .*Plan here and train by the saved plan"):
        train_adapter(model, word_tokenizer(), made, rows, tmp_path / "adapter", TrainOptions(steps=3))
    assert {name: (p.requires_grad, p.device.type) for name, p in model.named_parameters()} == flags


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
def test_a_model_over_two_gpus_probes_and_trains_as_one_on_one(tmp_path):
    rows = tokenize(word_rows(24), word_tokenizer())
    places = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 1, "lm_head": 1}
    places |= {f"model.layers.{layer}": layer // 2 for layer in range(4)}
    one, two = build("llama").to("cuda:0"), dispatch_model(build("llama"), places)
    drawn = list(batches(list(rows)[:4], 2, 0))
    np.testing.assert_allclose(probe(two, drawn).batch_scores(), probe(one, drawn).batch_scores(), rtol=1e-4)
    made = plan(two, rows, strategy="last", num_layers=3, rank=4, allocation="uniform", probe_batches=2)
    options = TrainOptions(steps=3, batch_size=4, learning_rate=1e-2)
    records = [
        train_adapter(each, word_tokenizer(), made, rows, tmp_path / name, options)
        for each, name in ((one, "one"), (two, "two"))
    ]
    assert records[1]["losses"] == pytest.approx(records[0]["losses"], abs=1e-4)
    assert records[1]["engine"]["name"] == "device_map"


@pytest.mark.gpu
def test_a_group_of_one_process_works_by_nccl():
    torch.distributed.init_process_group("nccl", init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)
    try:
        rows = list(batches(list(tokenize(word_rows(8), word_tokenizer())), 2, 0))
        assert processes._group_device().type == "cuda"
        assert len(probe(build("llama").to("cuda"), rows).losses) == 4
        flag = torch.zeros(1, dtype=torch.int32, device=processes._group_device())
        torch.distributed.all_reduce(flag)
        found = [None]
        torch.distributed.all_gather_object(found, "told")
        assert found == ["told"]
    finally:
        torch.distributed.destroy_process_group()


def test_a_wrapped_or_sharded_model_is_not_probed():
    model = build("llama")
    wrapped = torch.nn.parallel.DistributedDataParallel.__new__(torch.nn.parallel.DistributedDataParallel)
    torch.nn.Module.__init__(wrapped)
    rows = list(batches(list(tokenize(word_rows(8), word_tokenizer())), 2, 0))
    with pytest.raises(ProbeError, match=r"probe model\.module"):
        probe(wrapped, rows)
    model.lm_head.weight.ds_id = 0  # how DeepSpeed marks what it has taken apart
    with pytest.raises(ProbeError, match="sharded over processes"):
        probe(model, rows)
    with pytest.raises(ConfigError, match="in parts over processes already"):
        check_engine(type("Arguments", (), {"n_gpu": 1})(), model)


# --- the command --------------------------------------------------------------------------------------------------


def test_the_command_runs_in_two_processes_and_one_prints_and_writes(tmp_path):
    model, data = save_model(tmp_path / "model"), save_rows(tmp_path / "rows.jsonl", word_rows(40))
    short = ["--probe-batches", "3", "--validation-rows", "4", "--rank", "4", "--json"]
    train = ["-m", "aletheia_lora", "train", model, data, "--steps", "2", "--output", tmp_path / "adapter", *short]
    (code, text, errors), (other, silence, _) = launch(train, 2, tmp_path / "train")
    assert (code, other) == (0, 0), errors[-3000:]
    record = json.loads(text.splitlines()[-1])
    assert record["engine"] == {"name": "DDP", "num_processes": 2, "limits": {}} and not silence.strip()
    assert {"adapter_model.safetensors", "record.json", "plan.json"} <= {*os.listdir(tmp_path / "adapter")}
    PeftModel.from_pretrained(build("llama"), tmp_path / "adapter")


EXAMPLES = Path(__file__).resolve().parents[1] / "examples" / "distributed"


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.yaml")), ids=lambda file: file.stem)
def test_ready_configurations_are_read_by_accelerate_and_named_in_the_readme(file):
    config = load_config_from_file(str(file))
    assert config.num_processes == 2 and str(config.distributed_type).removeprefix("DistributedType.")
    assert f"`{file.name}`" in (EXAMPLES / "README.md").read_text()
