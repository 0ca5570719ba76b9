"""The forgetting report as table, figures and page: the finding, the gaps, and text shown as text."""

import copy
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from aletheia_lora.errors import DataError
from aletheia_lora.evaluation.forgetting import forgetting_report
from aletheia_lora.report.forgetting import forgetting_finding, forgetting_table, number
from aletheia_lora.report.forgetting_page import render_forgetting, write_forgetting
from aletheia_lora.report.forgetting_plots import draw_forgetting, forgetting_titles
from aletheia_lora.report.page import render_page, write_page
from aletheia_lora.report.words import visible
from forgetting_items import ABOUT, GROUPS, study
from report_record import HOSTILE, Page, make_record

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def made() -> dict[str, Any]:
    return forgetting_report(
        study(repeat=True), margin=2.0, loss_margin=0.02, repeat="selected_again", groups=GROUPS, about=ABOUT
    )


@pytest.fixture
def record(made: dict[str, Any]) -> dict[str, Any]:
    return copy.deepcopy(made)


def extra_of(record: dict[str, Any], index: int) -> dict[str, Any]:
    return next(arm["extra"] for arm in record["tasks"][index]["arms"] if arm["label"] == "selected")


def with_verdicts(record: dict[str, Any], *verdicts: str) -> dict[str, Any]:
    for index, verdict in enumerate(verdicts):
        extra_of(record, index)["verdict"] = verdict
    return record


def test_finding_counts_what_is_equal_and_names_what_is_open(record: dict[str, Any]) -> None:
    assert forgetting_finding(with_verdicts(record, "equivalent", "equivalent", "undecided", "undecided")) == (
        "The selected layers forgot as much as uniform LoRA within 2 points on 2 of 4 benchmarks (mmlu and gsm8k); "
        "humaneval and wikitext are not decided."
    )


def test_finding_leads_with_what_was_lost(record: dict[str, Any]) -> None:
    told = forgetting_finding(with_verdicts(record, "equivalent", "more", "equivalent", "equivalent"))
    assert told.startswith("The selected layers forgot more than uniform LoRA on gsm8k (by ")
    assert "95 % interval" in told
    assert "within the margins on 3 of 4 benchmarks (mmlu, humaneval and wikitext)." in told


def test_finding_of_nothing_decided_claims_nothing(record: dict[str, Any]) -> None:
    told = forgetting_finding(with_verdicts(record, *["undecided"] * 4))
    assert told.startswith("It is not decided whether the selected layers forgot more on mmlu, gsm8k, humaneval and")
    assert forgetting_finding({**record, "tasks": []}).startswith("No benchmark was evaluated")


def test_table_has_a_row_for_every_benchmark_and_model(record: dict[str, Any]) -> None:
    rows = forgetting_table(record)
    assert len(rows) == 4 * 4
    assert rows[0]["Items"] == "1,140 in 57 groups"
    assert rows[0]["Forgotten"] == "–"
    extra = extra_of(record, 0)
    wanted = f"{number(extra['mean'], 'points', signed=True)} ({number(extra['low'], 'points')} to "
    assert rows[2]["More than uniform LoRA"].replace("\u00a0", " ").startswith(wanted)
    assert rows[12]["Score, loss"].endswith("nats per token")


def test_a_gap_is_shown_as_one() -> None:
    results = [item for item in study(texts=0, subjects=2) if (item.label, item.task) != ("selected", "humaneval")]
    results = [item for item in results if (item.label, item.task, item.item_id) != ("base", "gsm8k", "0007")]
    record = forgetting_report(results, margin=2.0, missing="leave_out", groups=GROUPS)
    rows = forgetting_table(record)
    assert [row["Items"] for row in rows if row["Model"] == "selected layers"] == [
        "40 in 2 groups",
        "659, 1 left out",
        "– (not evaluated)",
    ]
    text = Page(render_forgetting(record, {})).text
    assert "There are gaps. not evaluated: humaneval: selected layers. left out on gsm8k" in text
    assert "humaneval was not compared" in forgetting_finding(record)
    assert "The figure “forgetting” was not drawn." in text
    assert all(image.startswith(PNG) for image in draw_forgetting(record).values())


def test_cut_answers_make_the_page_object() -> None:
    results = study(texts=0, subjects=0)
    cut = [replace(item, stop_reason="length") if item.label == "selected" else item for item in results]
    text = Page(render_forgetting(forgetting_report(cut, margin=2.0), {})).text
    assert re.search(r"differs\s*gsm8k: answers or .* cut .*base model 0, uniform LoRA 0, selected layers 660", text)


def test_page_says_noise_margin_and_limits(record: dict[str, Any]) -> None:
    text = Page(render_forgetting(record, {})).text.replace("\u00a0", " ")
    noise = record["tasks"][1]["noise"]
    assert f"{noise['num_worse'] + noise['num_better']} of 660 scores changed" in text
    assert "fixed beforehand: 2 points and 0.02 nats" in text
    assert "what another training run would forget, they do not say" in text
    for task in record["tasks"]:
        task["noise"] = None
    assert "No adapter was evaluated twice" in Page(render_forgetting(record, {})).text


def test_page_figures_and_record_lie_side_by_side(record: dict[str, Any], tmp_path: Path) -> None:
    page = Page(write_forgetting(record, tmp_path).read_text(encoding="utf-8"))
    names = ("forgetting", "extra_forgetting", "forgetting_loss", "extra_forgetting_loss")
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(
        ["forgetting.html", "forgetting.json", *(f"{name}.png" for name in names)]
    )
    assert json.loads((tmp_path / "forgetting.json").read_text(encoding="utf-8")) == record
    assert page.tags.count("img") == 4
    assert not {"script", "iframe", "object", "embed", "form", "base", "video", "a"} & set(page.tags)
    for tag, name, value in page.attributes:
        assert name not in ("src", "href") or value.startswith("data:"), (tag, name, value[:80])
    policy = next(value for _, name, value in page.attributes if name == "content" and "default-src" in value)
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline'")


def test_titles_say_the_finding(record: dict[str, Any]) -> None:
    titles = forgetting_titles(with_verdicts(record, "equivalent", "undecided", "undecided", "equivalent"))
    assert titles["extra_forgetting"] == (
        "Selected layers against uniform LoRA on 3 benchmarks: 1 equal within 2 points, 2 not decided"
    )
    assert titles["forgetting"].startswith("Most was forgotten on ")
    assert re.fullmatch(
        r"The selected layers forgot 0\.\d+ nats (more|less) than uniform .* nats", titles["extra_forgetting_loss"]
    )


def test_a_comparison_with_a_forgetting_record_shows_it_on_its_page(record: dict[str, Any], tmp_path: Path) -> None:
    comparison = {**make_record(), "forgetting": record}
    page = Page(write_page(comparison, tmp_path).read_text(encoding="utf-8"))
    assert "Was anything forgotten?" in page.text
    assert page.tags.count("img") == 8
    assert (tmp_path / "extra_forgetting.png").read_bytes().startswith(PNG)
    assert "Was anything forgotten?" not in Page(render_page(make_record(), {})).text


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_is_shown_as_text(record: dict[str, Any], text: str) -> None:
    clean = Page(render_forgetting(copy.deepcopy(record), {}))
    record.update(model=text, data=text, created=text, environment={text: text})
    for task in record["tasks"]:
        task["task"] = f"{text} {task['task']}"
        task["metric"] = text
        task["arms"][3]["label"] = text
    record["adapters"][text] = text
    html = render_forgetting(record, {})
    page = Page(html)
    assert set(page.tags) == set(clean.tags)
    assert {name for _, name, _ in page.attributes} == {name for _, name, _ in clean.attributes}
    assert re.sub(r"\s+", " ", visible(text)) in page.text
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069]", html)
    assert all(image.startswith(PNG) for image in draw_forgetting(record).values())


@pytest.mark.parametrize(
    ("place", "words"),
    [
        (lambda record: record.update(format="aletheia-compare/1"), "not a forgetting record"),
        (lambda record: extra_of(record, 0).update(mean=9.0), "extra of selected on mmlu is 9, but its parts give"),
        (lambda record: record["tasks"][1]["arms"][0].update(score=1.0), "forgetting of uniform on gsm8k"),
    ],
)
def test_a_record_that_contradicts_itself_is_refused(record: dict[str, Any], place: Any, words: str) -> None:
    place(record)
    for call in (forgetting_finding, forgetting_table, lambda broken: render_forgetting(broken, {})):
        with pytest.raises(DataError, match=words):
            call(record)
