"""The table of docs/models.md: every causal-LM type of transformers, what of it can be adapted and what is left out.

    python benchmarks/models/run.py            # writes docs/models.md; a few minutes, no network

Each type is the tiny model of tests/model_zoo.py; tests/test_models.py proves each line on it.
"""

import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

import transformers  # noqa: E402

import model_zoo  # noqa: E402
from aletheia_lora.anatomy import ModelAnatomy, anatomy  # noqa: E402

TABLE = ROOT / "docs" / "models.md"
HEADER = """# Model families

Every model type that transformers {version} knows as a causal language model. Each is built tiny and at random from
its default configuration (`tests/model_zoo.py`), then read, probed, adapted in two of its layers, trained for a step,
saved, loaded by stock PEFT (same logits) and merged (`tests/test_models.py`). Made by `benchmarks/models/run.py`.

{exact} of {tried} types pass; in {whole} of them every matrix of a layer can be adapted, in {routers} more every one
but the router. {refused} are refused with the reason, {not_built} cannot be built small. No type is adapted otherwise
than planned: a census of the model raises before the first step.

The share is of the weights in the layers' matrices of the tiny model; `aletheia doctor MODEL` says it for a real one.

| type | class | adaptable | left out, and why |
| --- | --- | ---: | --- |
"""


def line(family: str) -> str:
    """The family's row of the table."""
    found = anatomy(model_zoo.build(family))
    return f"| {family} | {found.architecture} | {share(found)} | {left_out(found)} |"


def share(found: ModelAnatomy) -> str:
    """Per cent; 100 only where nothing is left out."""
    return "100 %" if not found.left_out else f"{min(100 * found.adaptable_share, 99.9):.1f} %"


def left_out(found: ModelAnatomy) -> str:
    """What gets no adapter, by reason, without the numbers of layers."""
    paths: dict[str, set[str]] = {}
    for item in found.left_out:
        path = item.name.removeprefix(f"{found.layers[item.layer_idx].name}.")
        paths.setdefault(item.reason, set()).add(re.sub(r"\b\d+\b", "N", path))
    return "; ".join(f"{reason}: {', '.join(f'`{p}`' for p in sorted(names))}" for reason, names in paths.items())


def main() -> None:
    """Write the table."""
    rows = [line(family) for family in model_zoo.FAMILIES]
    routers = sum(" router: " in row and ";" not in row for row in rows)
    text = HEADER.format(
        version=transformers.__version__,
        exact=len(rows),
        tried=len(model_zoo.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - len(model_zoo.NOT_BUILT),
        whole=sum("| 100 % |" in row for row in rows),
        routers=routers,
        refused=len(model_zoo.REFUSED),
        not_built=len(model_zoo.NOT_BUILT),
    )
    text += "\n".join(rows) + "\n\n## Refused\n\n| type | reason |\n| --- | --- |\n"
    text += "".join(f"| {name} | {reason} |\n" for name, reason in model_zoo.REFUSED.items())
    text += "\n## Not built\n\n| type | reason |\n| --- | --- |\n"
    text += "".join(f"| {name} | {reason} |\n" for name, reason in model_zoo.NOT_BUILT.items())
    TABLE.write_text(text, encoding="utf-8")
    print(f"wrote {TABLE.relative_to(ROOT)}: {len(rows)} families")


if __name__ == "__main__":
    main()
