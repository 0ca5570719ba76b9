"""A made-up but consistent comparison record, a poisoned one, and a reader of pages, for the tests of the report."""

import math
import re
from html.parser import HTMLParser
from statistics import median
from typing import Any

import numpy as np

from aletheia_lora.report.page import render_page

NUM_LAYERS, STEPS, PROBE_SECONDS, BASE_LOSS = 30, 40, 9.0, 2.377
CHOSEN = list(range(15, 30))
HOSTILE = (
    "<script>document.title='owned'</script>",
    "<img src=x onerror=\"document.title='owned'\">",
    '"><svg onload="document.title=\'owned\'">',
    "javascript:document.title='owned'",
    "\x1b[31mred\x1b]0;owned\x07",
    "evil\u202egnp.exe\u200b",
    "{{ 7 * 7 }}{% raw %}",
    "$\\frac{1}{0$ \\input{x} _^",
    "=cmd|' /C calc'!A0",
    "lone \ud800 surrogate, \x00 nul, 中文 🦙",
)


def make_arm(
    name: str, title: str, role: str, trainer: str, layers: list[int], step: float, **more: Any
) -> dict[str, Any]:
    """One arm of a comparison, with step times that wobble by a seeded generator and a slow first step."""
    full, num_steps, probe = more.pop("full", True), more.pop("steps", STEPS), more.pop("probe", 0.0)
    end = more.pop("end", 1.221)
    rng = np.random.default_rng(len(name))
    times = [float(step * (1 + 0.05 * abs(rng.normal()))) for _ in range(num_steps if full else 8)]
    times[0] *= 3
    low, middle, high = (float(value) for value in np.quantile(times[1:], [0.2, 0.5, 0.8]))
    heldout = [
        {"step": done, "seconds": probe + sum(times[:done]), "loss": end + 0.4 * (1 - done / num_steps) ** 2}
        for done in range(10, num_steps + 1, 10)
    ]
    return {
        "name": name,
        "title": title,
        "role": role,
        "trainer": trainer,
        "layers": layers,
        "ranks": [16] if role == "uniform" else [16, 64],
        "trainable_params": 162_816 * len(layers),
        "learning_rate": 2e-3,
        "steps": len(times),
        "full": full,
        "step_seconds": times,
        "median_step_seconds": middle,
        "step_seconds_p20": low,
        "step_seconds_p80": high,
        "total_seconds": sum(times) + probe,
        "lowest_backward_layer": min(layers),
        "first_loss": 2.4131,
        "train_losses": [2.4131 - 0.01 * index for index in range(len(times))],
        "heldout": heldout if full else [],
        "final_heldout_loss": heldout[-1]["loss"] if full else None,
        "failed": None,
        **more,
    }


def make_time_matched(every: list[int]) -> list[dict[str, Any]]:
    """All and the chosen layers, as long as plain PEFT."""
    (name, title), (all_name, all_title) = (
        (f"{name}_time_matched", f"{title}, as long as plain PEFT")
        for name, title in (("selected", "15 selected layers"), ("uniform_aletheia", "uniform LoRA, our trainer"))
    )
    return [
        make_arm(all_name, all_title, "uniform", "aletheia", every, 1.12, steps=46, end=1.219),
        make_arm(name, title, "selected", "aletheia", CHOSEN, 0.74, probe=PROBE_SECONDS, steps=60, end=1.215),
    ]


def make_record() -> dict[str, Any]:
    """A comparison as `aletheia compare` writes it, made up but consistent."""
    every, rng = list(range(NUM_LAYERS)), np.random.default_rng(0)
    scores = [12 + 0.6 * layer + 2 * math.sin(layer) for layer in every]
    drawn = sorted(rng.choice(NUM_LAYERS, 15, replace=False).tolist())
    arms = [
        make_arm("uniform", "uniform LoRA, plain PEFT under Trainer", "uniform", "trainer", every, 1.39),
        make_arm("uniform_trl", "uniform LoRA, TRL as shipped", "uniform", "trl_as_shipped", every, 1.31, full=False),
        make_arm("uniform_aletheia", "uniform LoRA, our trainer", "uniform", "aletheia", every, 1.12, full=False),
        make_arm(
            "selected", "15 selected layers", "selected", "aletheia", CHOSEN, 0.74, probe=PROBE_SECONDS, end=1.234
        ),
        make_arm("random", "15 layers, random", "control", "aletheia", drawn, 0.98, end=1.252),
        *make_time_matched(every),
    ]
    shares = [(15 + lowest) / 30 for lowest in every]
    record = {
        "format": "aletheia-compare/1",
        "created": "2026-11-21T22:50:00+00:00",
        "model": "SmolLM2-135M-Instruct",
        "architecture": "LlamaForCausalLM",
        "num_layers": NUM_LAYERS,
        "data": "docstrings of the Python standard library",
        "environment": {"python": "3.11.7", "torch": "2.11.0", "device": "CPU, 2 cores"},
        "settings": {
            "steps": STEPS,
            "batch_size": 4,
            "seed": 0,
            "score": "gradient_norm",
            "uniform_learning_rate": None,
        },
        "probe": {
            "scores": scores,
            "standard_errors": [0.05 * score for score in scores],
            "seconds": PROBE_SECONDS,
            "num_batches": 8,
            "spread": max(scores) / min(scores),
            "split_half_overlap": 0.88,
            "peak_memory_bytes": 612_000_000,
        },
        "selection": {
            "strategy": "budget",
            "layers": CHOSEN,
            "describe": "layers 15–29, backward stops at 15",
            "lowest": 15,
            "score_share": 0.61,
            "predicted_time_share": 0.67,
        },
        "pareto": [
            {
                "lowest": NUM_LAYERS - 1 - lowest,
                "num_layers": lowest + 1,
                "layers": every[NUM_LAYERS - 1 - lowest :],
                "score_share": (lowest + 1) / NUM_LAYERS,
                "predicted_time_share": shares[lowest] / shares[-1],
            }
            for lowest in every
        ],
        "base_heldout_loss": BASE_LOSS,
        "arms": arms,
    }
    record["summary"] = make_summary(arms)
    return record


def make_summary(arms: list[dict[str, Any]]) -> dict[str, Any]:
    by_name = {arm["name"]: arm for arm in arms}
    uniform, selected, ours = by_name["uniform"], by_name["selected"], by_name["uniform_aletheia"]
    matched, all_layers = by_name["selected_time_matched"], by_name["uniform_aletheia_time_matched"]
    paid = selected["median_step_seconds"] * STEPS + PROBE_SECONDS
    shared = slice(1, min(len(ours["step_seconds"]), STEPS))  # two arms are compared over the steps that both took
    before = median(ours["step_seconds"][shared]) / median(selected["step_seconds"][shared])
    before *= selected["median_step_seconds"]
    return {
        "speedup_ratio": uniform["median_step_seconds"] * STEPS / paid,
        "selection_ratio": before * STEPS / paid,
        "trainer_ratio": uniform["median_step_seconds"] / ours["median_step_seconds"],
        "fastest_uniform": "uniform_aletheia",
        "uniform_seconds": uniform["total_seconds"],
        "selected_seconds": selected["total_seconds"],
        "uniform_heldout_loss": uniform["final_heldout_loss"],
        "selected_heldout_loss": selected["final_heldout_loss"],
        "time_matched_heldout_loss": matched["final_heldout_loss"],
        "time_matched_steps": matched["steps"],
        "time_matched_uniform_heldout_loss": all_layers["final_heldout_loss"],
        "time_matched_uniform_steps": all_layers["steps"],
        "selected_layers": CHOSEN,
        "probe_seconds": PROBE_SECONDS,
    }


def arm_of(record: dict[str, Any], name: str) -> dict[str, Any]:
    return next(arm for arm in record["arms"] if arm["name"] == name)


def poisoned(text: str) -> dict[str, Any]:
    """A record with ``text`` in every place that a model, a data set or an exception can write to."""
    record = make_record()
    for name in ("model", "architecture", "data", "created"):
        record[name] = text
    record["selection"].update(strategy=text, describe=text)
    record["environment"].update({text: text, "device": text})
    record["settings"].update({text: text, "seed": text})
    for arm in record["arms"]:
        arm.update(title=f"{text} {arm['name']}", trainer=text, ranks={text: text})
    arm_of(record, "random")["failed"] = text
    return record


class Page(HTMLParser):
    """Tags, attributes and text of a page, as a browser without style would read them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self._silent = 0
        self.feed(html)
        self.text = re.sub(r"\s+", " ", self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self._silent += tag == "style"

    def handle_endtag(self, tag: str) -> None:
        self._silent -= tag == "style"

    def handle_data(self, data: str) -> None:
        self.text += "" if self._silent else data


def page_of(record: dict[str, Any]) -> Page:
    return Page(render_page(record, {}))
