"""One shape -> a record: the probe, then every run in turns on one copy of the frozen weights.

A run is a choice of layers and ranks (:data:`CHOICES`) on one of three paths: ``peft`` (plain PEFT, full logits, the
model's own loss), ``trl`` (logits where labelled) and ``ours`` (logits where labelled, fast adapters, backward cut at
the lowest adapted layer), with or without the states below that layer replayed from a prefix cache.
"""

import contextlib
import dataclasses
import gc
import signal
import time
from dataclasses import dataclass

WARM_UP_ROUNDS = 2  # with a prefix cache: the first keeps the states, the second compares a replay with a fresh forward
RANK = 16
SEED = 0
PROBE_ROWS = 8
MAX_HASHED_BYTES = 10 * 2**30
"""A prefix cache is named by the bytes of all weights below; reading more than this would take the run's time."""


@dataclass(frozen=True)
class Run:
    """What takes turns."""

    choice: str
    path: str
    prefix: bool = False


RUNS = {
    "uniform_peft": Run("uniform", "peft"),
    "uniform_trl": Run("uniform", "trl"),
    "uniform_ours": Run("uniform", "ours"),
    "paper_peft": Run("paper", "peft"),
    "paper": Run("paper", "ours"),
    "last_half": Run("last_half", "ours"),
    "budget": Run("budget", "ours"),
    "paper_prefix": Run("paper", "ours", prefix=True),
    "last_half_prefix": Run("last_half", "ours", prefix=True),
    "budget_prefix": Run("budget", "ours", prefix=True),
}


@dataclass(frozen=True)
class Settings:
    """The same for every shape of a run of this script."""

    device: str
    length: int
    steps: int
    prefix: bool


class TimeUp(BaseException):
    """The time of a shape is over. Not an ``Exception``: nothing on the way may take it for a failed run."""


@contextlib.contextmanager
def time_limit(seconds):
    """Raise :class:`TimeUp` in this (main) thread when the seconds are over."""

    def over(_signal, _frame):
        raise TimeUp

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def measured(name, shape, settings, seconds):
    """The record of one shape; whatever goes wrong is in it, with what was measured until then."""
    record = {"shape": name, "failed": None, "runs": []}
    started = time.perf_counter()
    try:
        with time_limit(seconds):
            measure(record, shape, settings, started + seconds)
    except TimeUp:
        record["failed"] = f"its {seconds:.0f} seconds were over"
    except Exception as error:  # recorded: the shapes after it shall run
        record["failed"] = reason(error)
    record["wall_seconds"] = time.perf_counter() - started
    free(settings.device)
    return record


def measure(record, shape, settings, until):
    """Fill the record of one shape, part by part."""
    import torch
    from shapes import build

    device = torch.device(settings.device)
    rows = max(shape.num_tokens // settings.length, 1)
    record |= {
        "model_type": shape.model_type,
        "numbers": shape.numbers,
        "num_layers": shape.num_layers,
        "published_layers": shape.published_layers or shape.num_layers,
        "storage": "nf4" if shape.four_bit else "bfloat16",
        "rows": rows,
        "length": settings.length,
    }
    before, started = allocated(device), time.perf_counter()
    model = build(shape, device)
    data = random_rows(shape.numbers["vocab_size"], settings.length, max(rows, PROBE_ROWS))
    batch = first_batch(data, rows, device)
    record |= {
        "num_params": int(sum(parameter.numel() for parameter in model.parameters())),
        "weights_bytes": None if before is None else allocated(device) - before,
        "attention": str(getattr(model.config, "_attn_implementation", None)),
        "build_seconds": time.perf_counter() - started,
    }
    with torch.no_grad():  # wake the libraries up, for the probe's own time
        model(batch["input_ids"][:, :16])
    chosen, costs = choices(record, model, data, rows, "gram" if shape.four_bit else "auto")
    bench = Bench(record, model, chosen, costs, settings, device)
    try:
        for checkpointing in (False, True):
            bench.take_turns(batch, checkpointing, until)
    finally:
        bench.close()


def random_rows(vocab_size, length, count):
    """Rows of random tokens, the second half of each labelled."""
    import numpy as np

    from aletheia_lora.data import NO_LABEL, TokenizedRow, TokenizedRows

    tokens = np.random.default_rng(SEED).integers(3, vocab_size, (count, length)).tolist()
    prompt = length // 2
    return TokenizedRows(
        tuple(TokenizedRow(tuple(row), (*[NO_LABEL] * prompt, *row[prompt:])) for row in tokens), source_format="random"
    )


def first_batch(data, rows, device):
    """The batch that every step takes."""
    from aletheia_lora.data import batches

    return {key: value.to(device) for key, value in next(batches(list(data), rows, 0)).items()}


# --- the probe, and what it chooses -----------------------------------------------------------------------------


def choices(record, model, data, rows, mode):
    """Probe; the anatomy and the ranks of each choice (or why there are none), and the cost of a step."""
    from aletheia_lora.allocation import allocate
    from aletheia_lora.errors import AletheiaError
    from aletheia_lora.plan_options import PlanOptions
    from aletheia_lora.planning import plan_from_probe
    from aletheia_lora.prediction import probe_cost
    from aletheia_lora.probing import probe_rows
    from aletheia_lora.selection import select_layers

    num_layers = record["num_layers"]
    half = num_layers // 2
    options = PlanOptions(
        num_layers=half,
        time_budget=0.7,
        batch_size=rows,
        rank=RANK,
        probe_batches=PROBE_ROWS,
        probe_mode=mode,
        seed=SEED,
    )
    # Adapters are timed for the predictions; choices are made by counts all the same.
    found, probed = probe_rows(model, data, dataclasses.replace(options, calibrate=True))
    record["probe"] = {
        "seconds": probed.seconds,
        "batches": probed.num_batches,
        "rows_per_batch": probed.batch_size,
        "mode": mode,
        "extra_bytes": probed.peak_memory_bytes,
        "scores": [float(probed[layer]) for layer in range(num_layers)],
    }
    ways = {
        "uniform": lambda: allocate(found, range(num_layers), "uniform"),
        "paper": lambda: allocate(found, select_layers(probed, 50), "asymmetric"),
        "last_half": lambda: allocate(found, range(num_layers - half, num_layers), "matched"),
        "budget": lambda: plan_from_probe(found, probed, options).ranks,
    }
    ranks = {}
    for name, way in ways.items():
        try:
            ranks[name] = way()
        except (AletheiaError, ValueError) as error:
            ranks[name] = reason(error)
    return (found, ranks), {
        "calibrated": probe_cost(found, probed, rows),
        "counted": probe_cost(found, probed, rows, calibrate=False),
    }


def predicted_shares(found, costs, run, ranks, checkpointing):
    """Predicted step time as a share of uniform LoRA's on our path, by the probe's time and by counting."""
    from aletheia_lora.allocation import mean_ranks

    mean = mean_ranks(found, ranks)
    switches = {"checkpointing": checkpointing}
    return {
        name: cost.step(mean, rank=mean, prefix_cached=run.prefix, all_logits=run.path == "peft", **switches)
        / cost.uniform(rank=RANK, **switches)
        for name, cost in costs.items()
    }


# --- the runs ---------------------------------------------------------------------------------------------------


class Adapters:
    """One set of adapters on a twin of the model, with its optimizer and, where wanted, a prefix cache."""

    def __init__(self, model, found, ranks, device, prefix):
        import torch

        from aletheia_lora.adapter import attach, shared_copy

        self.device = device
        self.layers = sorted({entry.layer_idx for entry in ranks})
        self.cache = None
        if prefix:
            check_prefix(model, self.layers[0])
        self.base = shared_copy(model).train()
        self.model = attach(self.base, found, ranks, seed=SEED)
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5, fused=device.type == "cuda")
        labelled, self.loss_by = labelled_only(self.base, device)
        self.losses = {"peft": full_loss, "trl": labelled, "ours": labelled}
        if prefix:
            from aletheia_lora.training.prefix_cache import PrefixCache, PrefixCacheOptions

            self.cache = PrefixCache(self.base, self.layers[0], PrefixCacheOptions())

    @property
    def own_bytes(self):
        """Bytes of adapters and moments."""
        import torch

        moments = (value for state in self.optimizer.state.values() for value in state.values())
        tensors = [*self.trained, *(value for value in moments if isinstance(value, torch.Tensor))]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def checkpoint(self, on):
        """Switch activation checkpointing of the twin."""
        word = "activation" if hasattr(self.base, "activation_checkpointing_enable") else "gradient"  # transformers 6
        if on:
            getattr(self.base, f"{word}_checkpointing_enable")({"use_reentrant": False})
        else:
            getattr(self.base, f"{word}_checkpointing_disable")()

    @contextlib.contextmanager
    def on(self, path):
        """While open, the model runs as this path runs it."""
        from aletheia_lora.fast_lora import FastLora
        from aletheia_lora.training.truncation import Truncation

        shortcuts = [Truncation(self.base, self.layers[0]), FastLora(self.model)] if path == "ours" else []
        try:
            yield
        finally:
            for shortcut in shortcuts:
                shortcut.remove()

    def step(self, batch, path):
        """Forward, backward and update; seconds, the highest bytes above those before it, and the loss."""
        import torch

        with self.on(path):
            wait(self.device)
            resident = allocated(self.device)
            started = time.perf_counter()
            try:
                with torch.autocast(self.device.type, dtype=torch.bfloat16):
                    loss = self.losses[path](self.model, batch)
                loss.backward()
                self.optimizer.step()
            finally:
                self.optimizer.zero_grad()
            highest = wait(self.device)
            seconds = time.perf_counter() - started
        return seconds, None if highest is None else highest - resident, float(loss)

    def close(self):
        """Delete the prefix cache."""
        if self.cache is not None:
            self.cache.remove()


class Bench:
    """All runs of one shape, and the record that they fill."""

    def __init__(self, record, model, chosen, costs, settings, device):
        self.record, self.costs, self.settings, self.device = record, costs, settings, device
        self.found, ranks = chosen
        self.adapters, self.why_not = {}, {}
        self.ranks = ranks
        try:
            for run in RUNS.values():
                key = (run.choice, run.prefix)
                if key in self.adapters or key in self.why_not:
                    continue
                if run.prefix and not settings.prefix:
                    self.why_not[key] = "left out as asked"
                elif isinstance(ranks[run.choice], str):
                    self.why_not[key] = ranks[run.choice]
                else:
                    self.attach(key, model)
        except BaseException:
            self.close()
            raise

    def attach(self, key, model):
        """One set of adapters, or why there is none."""
        choice, prefix = key
        try:
            self.adapters[key] = Adapters(model, self.found, self.ranks[choice], self.device, prefix)
            return
        except Exception as error:
            self.why_not[key] = reason(error)
        free(self.device)

    def take_turns(self, batch, checkpointing, until):
        """Every run one step after the other, round after round, until the steps or the time are over."""
        lines = {name: self.new_line(name, run, checkpointing) for name, run in RUNS.items()}
        self.record["runs"] += lines.values()
        for adapters in self.adapters.values():
            adapters.checkpoint(checkpointing)
        try:
            for number in range(WARM_UP_ROUNDS + self.settings.steps):
                started = time.perf_counter()
                for name, run in RUNS.items():
                    if lines[name]["failed"] is None:
                        self.turn(lines[name], run, batch, number)
                if time.perf_counter() + 1.2 * (time.perf_counter() - started) > until:
                    break
        finally:
            for name, line in lines.items():
                self.finish(line, RUNS[name])

    def finish(self, line, run):
        """What the prefix cache did, and why there is no time where there is none."""
        adapters = self.adapters.get((run.choice, run.prefix))
        if adapters is not None and adapters.cache is not None:
            line["prefix"] = adapters.cache.record()
            if line["prefix"]["turned_off"]:
                line["failed"] = f"prefix cache turned off: {line['prefix']['turned_off']}"
        if line["failed"] is None and not line["step_seconds"]:
            line["failed"] = "no time was left for it"

    def new_line(self, name, run, checkpointing):
        """What is known of a run before its first step."""
        key = (run.choice, run.prefix)
        line = {"run": name, "checkpointing": checkpointing, "failed": self.why_not.get(key), "step_seconds": []}
        if key not in self.adapters:
            return line
        adapters, ranks = self.adapters[key], self.ranks[run.choice]
        return {
            **line,
            "layers": adapters.layers,
            "ranks": sorted({entry.rank for entry in ranks}),
            "trainable_params": sum(entry.num_params for entry in ranks),
            "loss_by": "the model, full logits" if run.path == "peft" else adapters.loss_by,
            "predicted_share": predicted_shares(self.found, self.costs, run, ranks, checkpointing),
            "lowest_backward_layer": None,
            "first_loss": None,
            "peak_bytes": None,
        }

    def turn(self, line, run, batch, number):
        """One step of one run; the first also finds out how far down backward goes. A failed run sits out."""
        from aletheia_lora.training.truncation import backward_depth

        adapters = self.adapters[run.choice, run.prefix]
        try:
            if number == 0:
                with backward_depth(adapters.base) as reached:
                    *_, line["first_loss"] = adapters.step(batch, run.path)
                line["lowest_backward_layer"] = min(reached, default=None)
            else:
                seconds, extra, _ = adapters.step(batch, run.path)
                if number >= WARM_UP_ROUNDS:
                    line["step_seconds"].append(seconds)
                    if extra is not None:
                        peak = self.record["weights_bytes"] + adapters.own_bytes + extra
                        line["peak_bytes"] = max(line["peak_bytes"] or 0, peak)
            return
        except Exception as error:
            line["failed"] = reason(error)
        free(self.device)

    def close(self):
        """Delete the prefix caches."""
        for adapters in self.adapters.values():
            adapters.close()


def full_loss(model, batch):
    """The model's own loss, with logits for every token."""
    return model(**batch, use_cache=False).loss


def labelled_only(base, device):
    """The loss that training would use where logits are made for labels only, and whose it is."""
    from aletheia_lora.loss import labelled_loss

    try:
        from trl.trainer.utils import add_fused_lm_head

        from aletheia_lora.padding import trl_skips_unlabelled
    except Exception:  # no TRL, an older one, or one that cannot be imported here
        return labelled_loss, "aletheia_lora.loss"
    if not trl_skips_unlabelled(device):
        return labelled_loss, "aletheia_lora.loss"
    add_fused_lm_head(base, outputs=("log_probs", "entropy", "is_top1"))
    return (lambda model, batch: model(**batch, fused_lm_head=True).loss), "TRL's fused head"


def check_prefix(model, lowest):
    """Refuse a prefix cache of nothing, or of weights that take too long to hash."""
    from aletheia_lora.layers import layer_blocks

    if lowest == 0:
        raise RuntimeError("layer 0 is adapted, so nothing lies below it to replay")
    above = {id(p) for layer in layer_blocks(model)[lowest:] for block in layer for p in block.parameters()}
    below = sum(p.numel() * p.element_size() for p in model.parameters() if id(p) not in above)
    if below > MAX_HASHED_BYTES:
        raise RuntimeError(
            f"{below / 2**30:.1f} GiB of weights lie below layer {lowest}; naming the cache by their bytes would take "
            f"longer than this run has (limit {MAX_HASHED_BYTES / 2**30:.0f} GiB)"
        )


# --- the device -------------------------------------------------------------------------------------------------


def wait(device):
    """Wait for the device; the highest bytes since the last wait, which the next count starts anew from. CPU: None."""
    import torch

    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    highest = int(torch.cuda.max_memory_allocated(device))
    torch.cuda.reset_peak_memory_stats(device)
    return highest


def allocated(device):
    """Bytes alive on the device; None on a CPU."""
    import torch

    return int(torch.cuda.memory_allocated(device)) if device.type == "cuda" else None


def free(device):
    """Drop what nobody holds any more."""
    import torch

    gc.collect()
    if torch.device(device).type == "cuda":
        with contextlib.suppress(Exception):  # a device in a bad state says so to the next shape
            torch.cuda.empty_cache()


def why_no_device(device):
    """Why nothing can be computed there, at all or after an error that a process does not recover from; else None."""
    import torch

    try:
        torch.ones(2, device=device).sum().item()
    except Exception as error:
        return reason(error)
    return None


def reason(error):
    """One line for a record."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:400]}"
