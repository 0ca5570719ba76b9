"""A plan and the record of its training -> the adapter's README, in the format of the Hub.

It says which layers, why and how sure that is, what it cost, and exactly what the files are; nothing that was not
measured. Names come from outside (a folder, a data set, a plan edited by hand): the front matter takes those that can
be repositories, the text shows them as code.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id

from ..planning import Plan
from ..selection import NOT_SHOWN, SCORED

BY_SCORE = ("top_percent", "above_median", "mass", "budget")
"""Strategies that prefer high scores, and so have an edge between layers."""
SURE = 2.0
"""Standard errors within which two scores count as tied."""
LONGEST_NAME = 200


def model_card(plan: Plan, record: Mapping[str, Any]) -> str:
    """The adapter's README: which layers, why, how sure, at what cost, and what exactly.

    Args:
        plan: The plan as it was trained.
        record: As :func:`~aletheia_lora.training.run.train_adapter` writes it.
    """
    adapter = record["adapter"]
    data = ModelCardData(
        base_model=_repository(record["model"]),
        datasets=[name] if (name := _repository(record["dataset_id"])) else None,
        library_name="peft",
        pipeline_tag="text-generation",
        tags=[adapter, "aletheia-lora"],
    )
    num_layers = len(plan.selection.layers)
    lines = [
        f"# {'LoRA' if adapter == 'lora' else adapter} adapter on {num_layers} of {plan.anatomy.num_layers} layers",
        "",
        *_origin(record),
        "",
        *_section("Which layers, and why", _choice(plan)),
        *_section("How sure that is", _certainty(plan)),
        *_section("What it cost, and what it is predicted to save", _cost(plan, record)),
        *_section("How it was trained", _training(record)),
        *_section("What exactly this is", _identity(plan, record)),
        "## How to load it",
        "",
        *_loading(record),
        "",
        "## What is not known",
        "",
        "Losses above are of training batches; nothing was held out or asked of this adapter here. Whether another",
        "choice of layers would have done better, and what was forgotten, is measured by `aletheia compare` and",
        "`aletheia eval`. The license of the base model and that of the data were not looked up.",
    ]
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines) + "\n")
    assert card.data.to_dict() == data.to_dict()
    return str(card)


def _section(title: str, facts: Sequence[str]) -> list[str]:
    return [f"## {title}", "", *(f"- {fact}" for fact in facts), ""]


def _origin(record: Mapping[str, Any]) -> list[str]:
    lines = [f"Made with `aletheia train` for the base model {_code(record['model'])}, on {_code(record['data'])}."]
    if record["revision"] is None:
        lines.append("The base model was loaded from a folder or file, so that name may not be one on the Hub.")
    return lines


# --- the choice -------------------------------------------------------------------------------------------------


def _choice(plan: Plan) -> list[str]:
    facts = [
        plan.selection.describe(plan.predicted_when),
        f"strategy {_code(plan.options.strategy)} on score {_code(plan.options.score)}; "
        f"ranks by {_code(plan.options.allocation)}",
    ]
    if plan.history:
        changes = ", ".join(f"{len(change.layers)} layers from step {change.step}" for change in plan.history)
        facts.append(f"the layers that train were changed on the way: {changes}")
    return [*facts, *_edge(plan)]


def _edge(plan: Plan) -> list[str]:
    """The lowest score chosen and the highest left out, and which layers the probe cannot tell from these."""
    chosen, scores = plan.selection.layers, plan.scores
    left_out = sorted(set(scores) - set(chosen))
    if plan.options.strategy in ("spread", "budget_spread"):
        return ["the highest score of each stretch of the depth was taken, so there is no one edge between scores"]
    if plan.options.strategy == "diverse":
        return [
            "high scores were taken one by one, each for less the more its gradients resemble those of a layer taken "
            "before, so there is no one edge between scores"
        ]
    if plan.options.strategy not in BY_SCORE:
        return ["this strategy does not prefer high scores, so no margin is given"]
    if not left_out:
        return ["every layer is adapted, so there is no edge"]
    low, high = min(chosen, key=scores.__getitem__), max(left_out, key=scores.__getitem__)
    margin = scores[low] - scores[high]
    facts = [
        f"at the edge: layer {low} has the lowest score that was chosen, {_score(plan, low)}; layer {high} the highest "
        f"that was left out, {_score(plan, high)}; margin {margin:.4g}"
    ]
    if margin < 0:
        facts.append("the margin is negative: predicted cost decided besides the scores")
    if _errors(plan) is None:
        return [*facts, f"ties at the edge: not known, {_why_no_errors(plan)}"]
    ties = (
        [layer for layer in left_out if _tied(plan, layer, low)],
        [layer for layer in chosen if _tied(plan, layer, high)],
    )
    if not any(ties):
        return [*facts, f"ties at the edge: none within {SURE:g} standard errors"]
    words = [
        f"{what} {', '.join(map(str, tied))}" for what, tied in zip(("left out", "chosen"), ties, strict=True) if tied
    ]
    return [
        *facts,
        f"ties at the edge, within {SURE:g} standard errors of the other side: {'; '.join(words)}. Other rows may swap "
        "them",
    ]


def _errors(plan: Plan) -> Any:
    """Standard error of each layer's score; None where they are not known."""
    if plan.probe is None or plan.options.score != "gradient_norm" or plan.probe.num_batches < 2:
        return None
    return plan.probe.standard_errors()


def _why_no_errors(plan: Plan) -> str:
    if plan.probe is None:
        return "the plan was made without a probe"
    if plan.options.score != "gradient_norm":
        return "standard errors are there for the score gradient_norm alone"
    return "one batch was probed"


def _score(plan: Plan, layer: int) -> str:
    errors = _errors(plan)
    return f"{plan.scores[layer]:.4g}" + ("" if errors is None else f" ± {errors[layer]:.2g}")


def _tied(plan: Plan, layer: int, other: int) -> bool:
    """True if the scores of two layers, paired over batches, differ by no more than :data:`SURE` standard errors."""
    assert plan.probe is not None
    table = plan.probe.batch_scores()
    difference = table[layer] - table[other]
    error = float(difference.std(ddof=1)) * math.sqrt(len(difference))
    return abs(float(difference.sum())) <= SURE * error


def _certainty(plan: Plan) -> list[str]:
    shown = [f"{NOT_SHOWN} (docs/findings.md of aletheia-lora)"] if plan.selection.strategy in SCORED else []
    return [*_measured_certainty(plan), *shown]


def _measured_certainty(plan: Plan) -> list[str]:
    probe = plan.probe
    if probe is None:
        return [f"not known: {_why_no_errors(plan)}"]
    rows = f"{probe.num_batches} batches of {probe.batch_size}, {sum(probe.num_labelled_tokens):,} labelled tokens"
    facts = [f"the probe read {rows}"]
    errors = _errors(plan)
    if errors is None:
        facts.append(f"standard errors of the scores: not known, {_why_no_errors(plan)}")
    else:
        share = np.median(errors / np.maximum([plan.scores[layer] for layer in range(len(errors))], 1e-300))
        facts.append(f"standard error of a layer's score: {100 * share:.1f} % of it in the median layer")
    if probe.num_batches > 1:
        count, total = len(plan.selection.layers), plan.anatomy.num_layers
        overlap = probe.split_half_overlap(100 * (count + 0.5) / total)
        facts.append(
            f"the {count} layers with the largest gradient norms by odd and by even batches: overlap {overlap:.2f} "
            "(1: the same layers)"
        )
    if probe.is_flat:
        facts.append(f"the profile is flat: largest over smallest gradient norm {probe.spread:.2f}, below 2.5")
    return facts


# --- what it took -----------------------------------------------------------------------------------------------


def _cost(plan: Plan, record: Mapping[str, Any]) -> list[str]:
    steps, seconds = record["options"]["steps"], record["seconds"]
    facts = [
        f"{record['trainable_params']:,} trainable weights in {len(plan.ranks)} modules, found there by census before "
        "the first step",
        f"measured: {steps} steps in {seconds:.1f} s, {seconds / steps:.3g} s a step with all that goes with it",
        f"backward stopped at layer {record['lowest_backward_layer']} (measured in the first step)",
    ]
    if plan.prediction is not None:
        facts.append(plan.prediction.describe())
    if not math.isnan(plan.selection.predicted_time_share):
        facts.append(
            f"predicted{plan.predicted_when}: {plan.selection.predicted_time_share:.2f} of the step time of uniform "
            "LoRA, not measured here"
        )
    if record["probe_seconds"] is not None:
        facts.append(f"the probe took {record['probe_seconds']:.1f} s")
    dead = record["dead_adapters"]
    if dead:
        facts.append(f"{len(dead)} adapters got no gradient in the first step")
    return facts


def _training(record: Mapping[str, Any]) -> list[str]:
    options, losses = record["options"], record["losses"]
    facts = [
        f"{record['train_rows']:,} rows; {options['steps']} steps of {options['batch_size']} rows a process and "
        f"{options['gradient_accumulation']} micro-batches, {record['engine']['num_processes']} processes "
        f"({_code(record['engine']['name'])})",
        f"learning rate {options['learning_rate']:g} at its peak, decaying linearly; seed {options['seed']}",
    ]
    if losses:
        facts.append(f"loss of the training batches: {losses[0]:.4f} first, {losses[-1]:.4f} last")
    cache = record["prefix_cache"]
    if cache is not None:
        replayed = cache["hits"] / max(cache["hits"] + cache["misses"], 1)
        facts.append(f"layers below the lowest adapted one were replayed at {100 * replayed:.0f} % of the rows visited")
    return facts


def _identity(plan: Plan, record: Mapping[str, Any]) -> list[str]:
    versions = ", ".join(f"{name} {value}" for name, value in record["environment"].items())
    revision = record["revision"]
    return [
        f"adapter weights: SHA-256 `{record['weights_sha256']}`",
        f"adapter configuration without the base model's name, as canonical JSON: SHA-256 `{record['config_sha256']}`",
        f"training rows, tokens and labels: SHA-256 `{record['train_digest']}`",
        f"base model: shape `{plan.anatomy.fingerprint}`"
        + ("" if revision is None else f", revision {_code(revision)}"),
        f"versions and machine: {versions}",
        "`plan.json` and `record.json` beside this file hold every score, rank and loss",
    ]


def _loading(record: Mapping[str, Any]) -> list[str]:
    name, revision = _repository(record["model"]), record["revision"]
    base = f'"{name}"' if revision is not None and name is not None else '"path/to/the/base-model"'
    if revision is not None and name is not None and re.fullmatch(r"[0-9a-f]{40}", revision):
        base += f', revision="{revision}"'
    return [
        "```python",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        f"base = AutoModelForCausalLM.from_pretrained({base})",
        'model = PeftModel.from_pretrained(base, "path/to/this/folder")  # or the name of its repository',
        "```",
    ]


# --- names from outside -----------------------------------------------------------------------------------------


def _repository(name: str | None) -> str | None:
    """The name, if a repository on the Hub can have it."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def _code(text: Any) -> str:
    """Text from outside as code in one line, which Markdown leaves alone."""
    shown = "".join(letter if letter.isprintable() else " " for letter in str(text))
    shown = " ".join(shown.split())[:LONGEST_NAME] or "unnamed"
    longest = max((len(run) for run in re.findall("`+", shown)), default=0)
    fence, pad = "`" * (longest + 1), " " if longest else ""
    return f"{fence}{pad}{shown}{pad}{fence}"
