"""The words of the report: the finding, the table, and what is refused."""

import copy
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from aletheia_lora.errors import DataError
from aletheia_lora.report.page import finding, render_page, write_page
from aletheia_lora.report.plots import draw_plots
from aletheia_lora.report.tables import comparison_table, markdown, paid_seconds
from aletheia_lora.report.words import duration, known, layer_ranges, loss_difference, significant, speed_text, visible
from report_record import arm_of, make_arm, make_record, page_of


@pytest.fixture
def record() -> dict[str, Any]:
    return make_record()


def row_of(record: dict[str, Any], name: str) -> dict[str, str]:
    index = [arm["name"] for arm in record["arms"]].index(name)
    return comparison_table(record)[index]


# --- the finding ------------------------------------------------------------------------------------------------------


def test_finding_names_speed_and_a_worse_loss_in_one_sentence(record: dict[str, Any]) -> None:
    ratio = record["summary"]["speedup_ratio"]
    assert finding(record) == (
        f"15 of 30 layers trained {ratio:.2f}x faster than uniform LoRA (probe included); "
        "held-out loss 1.234 against 1.221 at the same number of steps (1.1 % worse)."
    )


@pytest.mark.parametrize(
    ("loss", "words"), [(1.215, "0.5 % better"), (1.2212, "equal within 0.05 %"), (1.3, "6.5 % worse")]
)
def test_finding_calls_the_loss_what_it_is(record: dict[str, Any], loss: float, words: str) -> None:
    record["summary"]["selected_heldout_loss"] = loss
    assert f"({words})." in finding(record)


def test_finding_says_slower_when_the_probe_ate_the_gain(record: dict[str, Any]) -> None:
    selected = arm_of(record, "selected")
    selected["total_seconds"] += 60
    ratio = record["summary"]["speedup_ratio"] = paid_seconds(record, "uniform") / paid_seconds(record, "selected")
    assert ratio < 1
    assert f"trained {1 / ratio:.2f}x slower than uniform LoRA (probe included)" in finding(record)
    assert "slower than uniform LoRA in plain PEFT" in page_of(record).text


def test_finding_does_not_claim_what_was_not_measured(record: dict[str, Any]) -> None:
    record["summary"] = {}
    assert finding(record) == (
        "15 of 30 layers were trained, how fast against uniform LoRA is not known; the held-out loss was not measured."
    )


def test_finding_names_unequal_steps(record: dict[str, Any]) -> None:
    record["arms"] = [arm for arm in record["arms"] if arm["name"] != "uniform"] + [
        make_arm("uniform", "uniform", "uniform", "trainer", list(range(30)), 1.39, steps=50)
    ]
    assert "after 40 against 50 steps" in finding(record)
    assert "The selected layers took 40 steps, uniform LoRA 50." in page_of(record).text


@pytest.mark.parametrize(
    ("name", "words"), [("selected", "Training 15 of 30 layers failed"), ("uniform", "Uniform LoRA failed")]
)
def test_a_failed_side_leaves_nothing_to_compare(record: dict[str, Any], name: str, words: str) -> None:
    arm_of(record, name)["failed"] = "NonFiniteLossError: the loss of step 3 is nan"
    assert finding(record) == f"{words} (NonFiniteLossError: the loss of step 3 is nan); nothing can be compared."
    page = page_of(record)
    assert finding(record) in page.text
    assert "x faster than uniform LoRA in plain PEFT" not in page.text


# --- refusing what contradicts itself ---------------------------------------------------------------------------------


def test_another_format_is_refused(record: dict[str, Any], tmp_path: Path) -> None:
    record["format"] = "aletheia-plan/1"
    for call in (finding, comparison_table, lambda bad: render_page(bad, {}), lambda bad: write_page(bad, tmp_path)):
        with pytest.raises(DataError, match=r"format is 'aletheia-plan/1', expected 'aletheia-compare/1'"):
            call(record)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where", ["summary", "arm"])
def test_a_polished_number_is_refused(record: dict[str, Any], where: str, tmp_path: Path) -> None:
    target, key = (
        (record["summary"], "speedup_ratio") if where == "summary" else (record["arms"][3], "median_step_seconds")
    )
    target[key] *= 0.9
    with pytest.raises(DataError, match="contradicts itself"):
        write_page(record, tmp_path)


def test_numbers_rounded_by_hand_are_accepted(record: dict[str, Any]) -> None:
    record["summary"]["speedup_ratio"] = round(record["summary"]["speedup_ratio"], 2)
    assert "faster" in finding(record)


# --- the table --------------------------------------------------------------------------------------------------------


def test_table_says_layers_parameters_and_ratio_to_plain_peft(record: dict[str, Any]) -> None:
    row = row_of(record, "selected")
    assert row["Layers"] == "15 of 30 (15–29)"
    assert row["Trainable parameters"] == "2,442,240"
    assert row["Ranks"] == "16, 64"
    own, plain = arm_of(record, "selected")["step_seconds"], arm_of(record, "uniform")["step_seconds"]
    assert row["Step speed"] == f"{median(plain[1:]) / median(own[1:]):.2f}x"
    assert row["Held-out loss"] == "1.234"
    assert row_of(record, "uniform")["Layers"] == "30 of 30"
    assert row_of(record, "uniform")["Step speed"] == "1.00x"


def test_a_timed_arm_has_no_loss_and_says_why(record: dict[str, Any]) -> None:
    row = row_of(record, "uniform_trl")
    assert row["Held-out loss"] == row["Total seconds"] == "– (8 steps timed)"
    assert row["Seconds per step"] != "–"


def test_a_failed_arm_is_shown_without_its_numbers(record: dict[str, Any]) -> None:
    arm_of(record, "random")["failed"] = "OutOfMemoryError: 12 GiB"
    row = row_of(record, "random")
    assert row["Held-out loss"] == "– (failed: OutOfMemoryError: 12 GiB)"
    assert row["Seconds per step"] == row["Step speed"] == row["Total seconds"] == "–"
    page = page_of(record)
    assert "Failed, in no figure above: 15 layers, random (OutOfMemoryError: 12 GiB)." in page.text
    assert "1.252" not in page.text
    assert "No control was trained in full" in page.text


def test_a_failed_arm_moves_no_figure_but_the_one_that_names_it(record: dict[str, Any]) -> None:
    without = copy.deepcopy(record)
    without["arms"].remove(arm_of(without, "random"))
    failed = copy.deepcopy(record)
    arm_of(failed, "random").update(failed="boom", full=False)
    assert draw_plots(failed)["heldout"] == draw_plots(without)["heldout"] != draw_plots(record)["heldout"]


def test_without_plain_peft_there_is_no_speed(record: dict[str, Any]) -> None:
    record["arms"] = record["arms"][2:]
    record["summary"].update(speedup_ratio=None, uniform_heldout_loss=None)
    assert row_of(record, "selected")["Step speed"] == "– (no plain PEFT arm)"
    assert "how fast against uniform LoRA is not known" in finding(record)
    assert all(draw_plots(record).values())


def test_markdown_escapes_pipes_markup_and_html() -> None:
    text = markdown([{"Arm": "a|b `c` <b> [x](y) _z_ top_percent", "Loss": "1.2"}])
    assert text.splitlines()[2] == r"| a\|b \`c\` \<b\> \[x\](y) \_z\_ top_percent | 1.2 |"
    assert markdown([]) == "No arms were compared.\n"


# --- words ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (significant(0.081234), "0.0812"),
        (significant(1234.5), "1,234"),
        (significant(0), "0"),
        (duration(58.2), "58.2 s"),
        (duration(745), "12.4 min"),
        (duration(11_160), "3.10 h"),
        (duration(None), "– (not measured)"),
        (speed_text(1.714), "1.71x faster"),
        (speed_text(0.5), "2.00x slower"),
        (speed_text(1.004), "equally fast"),
        (loss_difference(0.0, 0.0), "equal"),
        (layer_ranges([29, 0, 1, 2, 7]), "0–2, 7, 29"),
        (visible("a\x1b[0m\n\u202eb\U000e0041"), "a\\x1b[0m\\n\\u202eb\\U000e0041"),
        (visible("Grüße, 中文"), "Grüße, 中文"),
    ],
)
def test_words(found: str, expected: str) -> None:
    assert found == expected


def test_only_finite_numbers_are_known() -> None:
    assert [known(value) for value in (1, 0.5, True, None, float("nan"), float("inf"), "1")] == [1, 0.5, *[None] * 5]
