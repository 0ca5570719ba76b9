"""The figures and the page of the report: drawn from any record, self-contained, and text shown as text."""

import ast
import copy
import json
import os
import re
import shutil
import subprocess
import sys
from html import escape
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib
import pytest

from aletheia_lora import report
from aletheia_lora.files import write_json
from aletheia_lora.report.canvas import drawable, spread
from aletheia_lora.report.page import finding, render_page, write_page
from aletheia_lora.report.plots import PLOTS, draw_plots, plot_probe_scores, plot_titles, write_plots
from aletheia_lora.report.tables import comparison_table, markdown, probe_seconds
from aletheia_lora.report.words import visible
from report_record import HOSTILE, PROBE_SECONDS, Page, arm_of, make_record, page_of, poisoned

PNG = b"\x89PNG\r\n\x1a\n"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), "")
QUIET = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"


@pytest.fixture
def record() -> dict[str, Any]:
    return make_record()


# --- figures ----------------------------------------------------------------------------------------------------------


def test_every_figure_is_a_png_of_some_size(record: dict[str, Any], tmp_path: Path) -> None:
    paths = write_plots(record, tmp_path)
    assert tuple(paths) == PLOTS
    for name, path in paths.items():
        assert path == tmp_path / f"{name}.png"
        assert path.read_bytes().startswith(PNG)
        assert path.stat().st_size > 15_000


def test_figures_are_the_same_whatever_the_users_matplotlib_settings(record: dict[str, Any]) -> None:
    before = draw_plots(record)
    with matplotlib.rc_context({"text.usetex": True, "font.size": 30, "axes.facecolor": "black"}):
        settings = dict(matplotlib.rcParams)
        assert draw_plots(record) == before
        assert dict(matplotlib.rcParams) == settings


def test_titles_say_the_finding(record: dict[str, Any]) -> None:
    titles = plot_titles(record)
    assert titles["scores"] == "15 of 30 layers (15–29) hold 61 % of the score"
    assert "held-out loss of 1.234" in titles["heldout"]
    assert titles["step_time"].startswith("A training step takes 0.7")
    assert titles["pareto"] == "The chosen layers keep 61 % of the score for a predicted 67 % of the time"


def test_standard_errors_are_drawn_only_for_the_score_they_belong_to(record: dict[str, Any]) -> None:
    other = copy.deepcopy(record)
    other["settings"]["score"] = "fisher"
    bare = copy.deepcopy(other)
    bare["probe"]["standard_errors"] = []
    assert draw_plots(other)["scores"] == draw_plots(bare)["scores"]


@pytest.mark.parametrize("num_layers", [1, 2, 30, 126])
def test_probe_scores_are_drawn_for_any_depth(num_layers: int) -> None:
    scores: list[float | None] = [1.0 + layer % 5 for layer in range(num_layers)]
    assert plot_probe_scores(scores).startswith(PNG)
    assert plot_probe_scores([None, *scores[1:]], [0.1] * num_layers, layers=[num_layers - 1]).startswith(PNG)


def test_labels_are_moved_apart_and_stay_inside() -> None:
    centres = spread([0.1, 0.1, 0.12, 0.99], [0.2, 0.2, 0.2, 0.2])
    assert all(upper - lower >= 0.2 - 1e-12 for lower, upper in pairwise(centres))
    assert centres[0] >= 0.1
    assert centres[-1] <= 0.9


def test_characters_that_the_font_lacks_become_boxes() -> None:
    assert drawable("a中b\nÄ") == "a□b\nÄ"


def test_a_record_with_nothing_optional_still_makes_a_page(record: dict[str, Any], tmp_path: Path) -> None:
    for name in ("probe", "selection", "summary", "environment", "settings"):
        record[name] = {}
    record["pareto"], record["base_heldout_loss"] = [], None
    for arm in record["arms"]:
        for name in (
            "ranks",
            "learning_rate",
            "first_loss",
            "lowest_backward_layer",
            "step_seconds_p20",
            "trainable_params",
        ):
            arm[name] = None
    text = Page(write_page(record, tmp_path).read_text(encoding="utf-8")).text
    assert "None" not in text.replace("None was run", "")
    assert "nan" not in text.lower().split()
    empty = {"format": "aletheia-compare/1", "arms": []}
    assert finding(empty) == "No arm with selected layers was run; nothing can be compared."
    assert all(image.startswith(PNG) for image in draw_plots(empty).values())


def test_nan_and_null_read_alike(record: dict[str, Any]) -> None:
    record["summary"]["time_matched_heldout_loss"] = record["probe"]["split_half_overlap"] = float("nan")
    with_nan = render_page(record, {})
    record["summary"]["time_matched_heldout_loss"] = record["probe"]["split_half_overlap"] = None
    assert render_page(record, {}) == with_nan
    assert "not run" in Page(with_nan).text


# --- the page ---------------------------------------------------------------------------------------------------------


def test_page_tells_the_trainer_from_the_selection(record: dict[str, Any]) -> None:
    text = page_of(record).text
    steps = [arm_of(record, name)["step_seconds"] for name in ("uniform", "uniform_aletheia")]
    plain, ours = (median(taken[1 : len(steps[1])]) for taken in steps)  # over the steps that both took
    assert f"trained {plain / ours:.2f}x faster than plain PEFT" in text
    assert f"the selected layers trained {record['summary']['selection_ratio']:.2f}x faster" in text
    assert f"{100 * (1 - ours / plain):.0f} % saved by the way of training alone" in text
    assert "saved by choosing layers, probe paid" in text
    assert "All layers in the same trainer and time reached 1.226 in 46 steps." in text
    assert "held-out loss, same time and trainer" in text and "1.215 against 1.226: 0.9 % better" in text


def test_a_record_without_all_layers_in_equal_time_compares_with_plain_peft(record: dict[str, Any]) -> None:
    for key in ("time_matched_uniform_heldout_loss", "time_matched_uniform_steps"):
        del record["summary"][key]
    text = page_of(record).text
    assert "All layers in the same trainer and time" not in text and "same time and trainer" not in text
    assert "1.215 against 1.221: 0.5 % better" in text


def test_page_gives_the_trainer_nothing_when_plain_peft_was_fastest(record: dict[str, Any]) -> None:
    record["summary"]["fastest_uniform"] = "uniform"
    text = page_of(record).text
    assert "the trainer saved nothing by itself" in text
    assert "saved by the way of training alone" not in text


def test_page_states_its_limits_and_checks(record: dict[str, Any]) -> None:
    arm_of(record, "uniform_trl")["first_loss"] = 2.45
    arm_of(record, "selected").update(learning_rate=1e-3, lowest_backward_layer=0)
    text = page_of(record).text
    assert "seed 0: n = 1" in text
    assert "uniform LoRA, TRL as shipped 2.4500" in text
    assert "down to layer 0; planned was 15" in text
    assert "0.001 for 15 selected layers" in text
    assert "Only timed, not trained to the end" in text
    assert "CPU, 2 cores" in text


def test_a_flat_profile_is_called_flat(record: dict[str, Any]) -> None:
    record["probe"]["spread"] = 1.8
    assert "it hardly tells the layers apart" in page_of(record).text


def test_probe_time_is_what_an_arm_paid_before_its_first_step(record: dict[str, Any]) -> None:
    assert probe_seconds(arm_of(record, "selected")) == pytest.approx(PROBE_SECONDS)
    assert probe_seconds(arm_of(record, "uniform")) == 0


def test_page_is_one_file_that_loads_and_runs_nothing(record: dict[str, Any], tmp_path: Path) -> None:
    path = write_page(record, tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(["page.html", *(f"{name}.png" for name in PLOTS)])
    page = Page(path.read_text(encoding="utf-8"))
    assert page.tags.count("img") == len(PLOTS)
    assert not {"script", "iframe", "object", "embed", "form", "base", "video", "a"} & set(page.tags)
    for tag, name, value in page.attributes:
        assert not name.startswith("on"), (tag, name)
        assert name not in ("src", "href") or value.startswith("data:"), (tag, name, value[:80])
        if name == "alt":
            assert len(value) > 20
    policy = next(value for _, name, value in page.attributes if name == "content" and "default-src" in value)
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline'")
    assert not re.search(r"https?:|//\w|url\(|@import", render_page(record, {}))


def test_the_record_reads_the_same_after_a_trip_through_json(record: dict[str, Any], tmp_path: Path) -> None:
    read = json.loads(write_json(tmp_path / "compare.json", record).read_text(encoding="utf-8"))
    assert render_page(read, {}) == render_page(record, {})


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_is_shown_as_text(text: str) -> None:
    html = render_page(poisoned(text), {})
    clean, page = Page(render_page(make_record(), {})), Page(html)
    assert set(page.tags) == set(clean.tags)
    assert {name for _, name, _ in page.attributes} == {name for _, name, _ in clean.attributes}
    assert [value for _, name, value in page.attributes if name in ("href", "src")] == ["data:,"]
    assert re.sub(r"\s+", " ", visible(text)) in page.text
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069]", html)
    assert all(image.startswith(PNG) for image in draw_plots(poisoned(text)).values())
    told = finding(poisoned(text)) + markdown(comparison_table(poisoned(text)))
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", told)


def test_a_hostile_failure_is_harmless_in_the_headline() -> None:
    record = make_record()
    arm_of(record, "selected")["failed"] = HOSTILE[0] + HOSTILE[4]
    html = render_page(record, {})
    assert "<script" not in html
    assert "\x1b" not in finding(record) + html


def test_report_imports_nothing_that_trains() -> None:
    folder = Path(report.__file__).parent
    allowed = sys.stdlib_module_names | {"matplotlib", "jinja2", "aletheia_lora"}
    for file in folder.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [str(node.module)] if node.level == 0 else []
                assert node.level < 2 or node.module in ("errors", "files"), f"{file.name}: {node.module}"
            assert {name.split(".")[0] for name in names} <= allowed, f"{file.name}: {names}"


# --- in a browser -----------------------------------------------------------------------------------------------------


def browse(page: Path, profile: Path, *more: str) -> tuple[str, str]:
    """The page as a browser leaves it, and what it said on its console."""
    command = [BROWSER, *QUIET.split(), "--disable-component-update", "--disable-sync", f"--user-data-dir={profile}"]
    command += ["--enable-logging=stderr", "--v=0", "--dump-dom", *more, page.as_uri()]
    environment = {**os.environ, "HOME": str(profile)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=True)
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


def width_on_a_phone(page: Path, profile: Path) -> int:
    """How wide the page lays itself out on a screen of 390 pixels."""
    measured = page.with_name("phone.html")
    inner = escape(page.read_text(encoding="utf-8"))
    script = "onload = () => { document.body.dataset.width = frames[0].document.documentElement.scrollWidth; };"
    measured.write_text(f'<iframe width=390 height=844 srcdoc="{inner}"></iframe><script>{script}</script>')
    dom, _ = browse(measured, profile)
    found = re.search(r'<body data-width="(\d+)"', dom)
    assert found, dom[-500:]
    return int(found[1])


@pytest.mark.browser
def test_the_page_fits_a_phone(record: dict[str, Any], tmp_path: Path) -> None:
    assert width_on_a_phone(write_page(record, tmp_path / "report"), tmp_path / "profile") <= 390


@pytest.mark.browser
def test_a_browser_opens_the_page_without_a_complaint(record: dict[str, Any], tmp_path: Path) -> None:
    page = write_page(record, tmp_path / "report")
    dom, console = browse(page, tmp_path / "profile")
    assert "trained" in dom
    assert dom.count("<img") == len(PLOTS)
    assert console == ""


@pytest.mark.browser
def test_hostile_text_does_nothing_in_a_browser_even_without_the_policy(tmp_path: Path) -> None:
    page = write_page(poisoned(" ".join(HOSTILE)), tmp_path / "report")
    html = page.read_text(encoding="utf-8")
    page.write_text(re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", html), encoding="utf-8")
    dom, console = browse(page, tmp_path / "profile")
    assert "<title>owned</title>" not in dom
    assert console == ""


@pytest.mark.browser
def test_the_browser_would_have_told_us(record: dict[str, Any], tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    bad = "<script>document.title='owned'</script><img src='https://example.invalid/x.png'></body>"
    html = render_page(record, {}).replace("</body>", bad)
    page.write_text(html, encoding="utf-8")
    dom, console = browse(page, tmp_path / "profile")
    assert "<title>owned</title>" not in dom
    assert "Content Security Policy" in console
    page.write_text(re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", html), encoding="utf-8")
    assert "<title>owned</title>" in browse(page, tmp_path / "profile")[0]
