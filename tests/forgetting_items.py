"""Simulated answers of a base model and its adapters, for the tests of the forgetting report."""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from aletheia_lora.evaluation.items import ItemResult

ABOUT = {
    "model": "SmolLM2-135M-Instruct",
    "data": "docstrings of the Python standard library",
    "environment": {"python": "3.11.7", "device": "CPU, 2 cores"},
}
SHIFTS = {"uniform": 0.03, "selected": 0.023, "random": 0.05}
"""Nats per token that plain text costs more after tuning."""
GROUPS = {"mmlu": [f"mmlu_subject_{index}" for index in range(57)], "mmlu_part": ["mmlu_subject_0", "mmlu_subject_1"]}


def sha(*parts: object) -> str:
    return hashlib.sha256("/".join(map(str, parts)).encode()).hexdigest()


def answer(label: str, task: str, item: str, **more: Any) -> ItemResult:
    """One right answer of ``label``, unless ``more`` says otherwise."""
    fields: dict[str, Any] = {
        "label": label,
        "adapter_digest": None if label == "base" else sha(label.removesuffix("_again")),
        "task": task,
        "item_id": item,
        "prompt_sha256": sha(task, item),
        "response": "42",
        "extracted": "42",
        "scores": {"exact_match": 1.0},
        "num_prompt_tokens": 90,
        "num_response_tokens": 30,
        "stop_reason": "eos",
    }
    return ItemResult(**{**fields, **more})


def answers_to(label: str, task: str, scores: Iterable[float], metric: str = "exact_match") -> list[ItemResult]:
    """One answer per score, items numbered from 0."""
    return [
        answer(label, task, f"{index:04}", scores={metric: float(score)}, response=f"{score:g}")
        for index, score in enumerate(scores)
    ]


def tuned(rng: np.random.Generator, right: np.ndarray, gain: float, loss: float) -> np.ndarray:
    """Answers after tuning: a share ``loss`` of the right ones turned wrong, ``gain`` of the wrong ones right."""
    draw = rng.uniform(size=len(right))
    return np.where(right == 1, draw >= loss, draw < gain).astype(float)


def study(
    seed: int = 0,
    *,
    sizes: Sequence[tuple[str, int]] = (("gsm8k", 660), ("humaneval", 100)),
    extra_loss: float = 0.0,
    subjects: int = 57,
    texts: int = 60,
    repeat: bool = False,
) -> list[ItemResult]:
    """Base, uniform, selected and a control on mmlu by subjects, on plain benchmarks, and on plain text.

    Uniform LoRA turns 6 % of the right answers wrong and 4 % of the wrong ones right; the selection the same, and
    ``extra_loss`` more wrong. A repeated evaluation changes 1 answer in 200.
    """
    rng = np.random.default_rng(seed)
    leaves = [(f"mmlu_subject_{index}", 20, "acc") for index in range(subjects)]
    leaves += [(name, size, "pass@1" if name == "humaneval" else "exact_match") for name, size in sizes]
    results = []
    for task, size, metric in leaves:
        base = (rng.uniform(size=size) < 0.45).astype(float)
        after = {
            "base": base,
            "uniform": tuned(rng, base, 0.04, 0.06),
            "selected": tuned(rng, base, 0.04, 0.06 + extra_loss),
            "random": tuned(rng, base, 0.04, 0.09),
        }
        after["selected_again"] = tuned(rng, after["selected"], 0.005, 0.005)
        for label, scores in after.items():
            results += answers_to(label, task, scores, metric) if repeat or label != "selected_again" else []
    for index in range(texts):
        tokens, nats = int(rng.integers(80, 500)), float(rng.normal(2.9, 0.4))
        losses = {label: nats + shift + 0.02 * float(rng.normal()) for label, shift in SHIFTS.items()}
        losses |= {"base": nats, "selected_again": losses["selected"] + 1e-6 * float(rng.normal())}
        for label, loss in losses.items():
            if repeat or label != "selected_again":
                sums = {"loglikelihood": -loss * tokens, "num_words": tokens * 0.75, "num_bytes": tokens * 4.1}
                text = {"response": "", "extracted": "", "stop_reason": "scored", "num_response_tokens": tokens}
                results.append(answer(label, "wikitext", f"{index:04}", scores=sums, **text))
    return results
