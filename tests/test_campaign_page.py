"""The report of a campaign as files: the same bytes from the same records, and text shown as text."""

import csv
import io
import re

import numpy as np
import pytest

from aletheia_lora.campaign.report import campaign_record, csv_text, report_text, shown, tables, write_report
from aletheia_lora.report.campaign_page import campaign_finding, render_campaign
from aletheia_lora.report.campaign_plots import _benchmarks_title, campaign_titles
from aletheia_lora.report.latex import escaped, latex
from aletheia_lora.report.words import visible
from campaign_results import benchmark, campaign, evaluated, method, named, result, spec
from report_record import HOSTILE, Page
from test_benchmarks import script
from test_report_page import PNG, browse, width_on_a_phone

HOSTILE_TEXT = [text for text in HOSTILE if "\ud800" not in text]  # a record is UTF-8
LONG = "x" * 3000
WORSE = [*HOSTILE_TEXT, "\"'\\", "../../x", "مرحبا \u202e שלום", LONG]
CLOCKED = {"speed.csv", "speed.tex", "speed.md", "times.csv", "report.html"}
CLOCKED |= {"speed_questions.csv", "speed_questions.tex"}
READ = (
    *("questions", "ranking", "comparisons", "deltas", "counted", "usefulness", "methods", "runs", "grid"),
    *("speed_questions", "speed"),
)
TABLES = (*READ, "scores", "times")
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069]")
FIGURES = ("controls", "deltas", "speedup", "families", "speed_quality", "scores")
MADE = spec(
    *("uniform", "paper", "last", "stride", "same_params"),
    method("random", draws=2),
    models=named("a", "b"),
    match=["steps", "time"],
    seeds=[0, 1],
)


def outcome(content, pace=1.0):
    """A plausible run that follows from its content."""
    name = content["method"]["name"]
    if (name, content["model"]["name"], content["seed"]) == ("stride", "b", 1):
        return "failed", "ValueError: no such column"
    moved = {"paper": 0.002, "last": 0.03, "stride": 0.02}.get(name, 0.0) + 0.004 * content["seed"]
    moved += 0.003 * len(name + content["model"]["name"] + content["match"]) + 0.001 * content["draw"]
    moved += (
        0.0001 * (len(name) % 4) * (content["seed"] + 2 * (content["model"]["name"] == "a"))
    )  # no pair like another
    step = pace * (0.6 if name == "paper" else 1.0)
    family = f"type-{content['model']['name']}"
    return result(content, heldout_loss=2.0 + moved, step_seconds=[step] * 10, model_type=family)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A campaign with its report."""
    made = campaign(tmp_path_factory.mktemp("campaign"), MADE, outcome)
    write_report(made)
    return made


def files(folder):
    """The bytes of a report."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in written(folder)}


def written(folder):
    return [path for path in [*folder.glob("*.*"), *folder.glob("figures/*")] if path.name != "campaign.json"]


# --- files ------------------------------------------------------------------------------------------------------


def test_the_report_is_markdown_tables_figures_and_a_page(folder):
    names = set(files(folder))
    figures = {f"figures/{name}.png" for name in FIGURES}
    made = {f"{name}.csv" for name in TABLES} | {f"{name}.tex" for name in READ}
    assert names == {"report.md", "speed.md", "report.html"} | figures | made
    for name in figures:
        content = (folder / name).read_bytes()
        assert content.startswith(PNG) and len(content) > 8_000


def test_the_same_records_give_the_same_bytes(folder):
    before = files(folder)
    write_report(folder)
    assert files(folder) == before


def test_only_what_a_clock_said_hangs_on_the_clock(folder, tmp_path):
    slower = campaign(tmp_path, MADE, lambda content: outcome(content, pace=1.5 if content["seed"] else 2.5))
    write_report(slower)
    before, after = files(folder), files(slower)
    differing = {name for name in before if before[name] != after[name]}
    assert "times.csv" in differing
    assert {name for name in differing if not name.startswith("figures/")} <= CLOCKED
    assert differing & {"figures/controls.png", "figures/deltas.png", "figures/scores.png"} == set()


def test_markdown_says_what_was_asked_and_what_is_missing(folder):
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert "54 of 56 runs ended well." in text
    assert "Margins, fixed beforehand: heldout_loss 0.01 nats." in text
    assert "| Is paper better than last at equal steps and count? |" in text
    assert "- b, t, seed 1: stride is failed (lines that lack it: " in text
    assert "No benchmark was evaluated: the campaign has no evaluation." in text
    assert "ValueError: no such column" in text
    speed = (folder / "speed.md").read_text(encoding="utf-8")
    assert "| all | all models | paper | 4 | 4 |" in speed


def test_csv_has_every_column_and_number(folder):
    rows = list(csv.DictReader(io.StringIO((folder / "comparisons.csv").read_text(encoding="utf-8"))))
    record = campaign_record(folder)
    assert [row["method"] for row in rows] == [row["method"] for row in record["tables"]["comparisons"]]
    means = [row["mean"] for row in record["tables"]["comparisons"]]
    assert [float(row["mean"]) if row["mean"] else None for row in rows] == means
    assert list(rows[0]) == list(record["tables"]["comparisons"][0])
    assert csv_text([{"a": "-1+1", "b": -0.5, "c": "\tx", "d": None}]) == "a,b,c,d\n'-1+1,-0.5,'\\tx,\n"


# --- LaTeX ------------------------------------------------------------------------------------------------------


def unescaped(line):
    """What is left of a line without its escapes: letters and the marks between columns."""
    words = "textbackslash|textasciitilde|textasciicircum|textless|textgreater|textbar|ldots"
    line = re.sub(rf"\\(?:{words})\{{\}}", "", line)
    line = re.sub(r"\\char(?:34|39|96)\{\}|\\ensuremath\{(?:-|\\times|\\cdot)\}|\{[]*[-]\}", "", line)
    return re.sub(r"\\[{}$&#%_]", "", line)


@pytest.mark.parametrize("text", WORSE, ids=range(len(WORSE)))
def test_latex_sets_any_text(text):
    lines = latex([{"a": text, "b_c": "1"}, {"a": "", "b_c": text}]).splitlines()
    assert lines[0] == r"\begin{tabular}{ll}" and lines[-1] == r"\end{tabular}"
    rows = [line for line in lines[1:-1] if line != r"\hline"]
    assert len(rows) == 3
    for line in rows:
        assert line.endswith(r" \\") and line.isascii() and line.isprintable()
        left = unescaped(line[: -len(r" \\")])
        assert left.count("&") == 1
        assert not set(left) & set("\\{}$#%_~^<>|\"'`[]*")


def test_latex_escapes_what_it_would_read():
    assert escaped("a_b & 50 % {x} \\y") == r"a\_b \& 50 \% \{x\} \textbackslash{}y"
    assert escaped("--[*] −1 中") == r"{-}{-}{[}{*}{]} \ensuremath{-}1 U+4E2D"
    assert latex([]) == "% nothing to show\n"


def test_every_latex_table_has_as_many_cells_in_each_row(folder):
    for name in READ:
        lines = (folder / f"{name}.tex").read_text(encoding="ascii").splitlines()
        if lines != ["% nothing to show"]:
            columns = lines[0].rstrip("}").rpartition("{")[2]
            rows = [line for line in lines[1:-1] if line != r"\hline"]
            assert {unescaped(line).count("&") + 1 for line in rows} == {len(columns)}


# --- the page ---------------------------------------------------------------------------------------------------


def test_the_page_says_the_finding_its_gaps_and_its_limits(folder):
    record = campaign_record(folder)
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    assert campaign_finding(record) in page.text.replace("\u00a0", " ")
    assert campaign_finding(record) == (
        "At equal steps, paper ended with a lower held-out loss than uniform LoRA, by less than the margin (4 of 4 "
        "pairs); against 3 controls: 3 better."
    )
    assert "b, t, seed 1: stride is failed" in page.text
    assert "not known" in page.text and "Every number on this page is read from the records" in page.text
    assert "CPU" in page.text and "owner/a, type-a" in page.text
    assert "None" not in page.text


def test_the_page_is_one_file_that_loads_and_runs_nothing(folder):
    html = (folder / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    assert page.tags.count("img") == 6
    assert not {"script", "iframe", "object", "embed", "form", "base", "video", "a"} & set(page.tags)
    for tag, name, value in page.attributes:
        assert not name.startswith("on"), (tag, name)
        assert name not in ("src", "href") or value.startswith("data:"), (tag, name, value[:80])
    policy = next(value for _, name, value in page.attributes if name == "content" and "default-src" in value)
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline'")


def test_titles_say_the_finding(folder):
    titles = campaign_titles(campaign_record(folder))
    assert re.match(r"paper: 1\.67x as fast as uniform LoRA \(", titles["speedup"])
    assert titles["families"] == "paper against uniform LoRA by model family: type-a 1.67x, type-b 1.67x"
    assert re.match(r"paper against 3 controls at equal steps: \d better", titles["controls"])
    assert titles["scores"] == "The upper half of the layers holds 70 % of the score"


def test_benchmarks_asked_at_equal_time_alone_are_the_ones_the_title_is_about():
    row = {"measure": "gsm8k", "unit": "points", "method": "paper", "against": "uniform", "match": "time"}
    row |= {"mean": 1.0, "verdict": "not known"}
    record = {
        "match": ["steps", "time"],
        "methods": [{"name": "uniform", "role": "uniform"}, {"name": "paper", "role": "selected"}],
        "tables": {"comparisons": [row]},
    }
    assert _benchmarks_title(record, ["gsm8k"]) == "paper against uniform LoRA on 1 benchmark: 1 not known"


def test_a_campaign_of_nothing_has_a_report(tmp_path):
    text = write_report(campaign(tmp_path, spec("uniform", "paper", match=["time", "steps"]), lambda content: None))
    assert "0 of 12 runs ended well." in text
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "not known" in page.text and "None" not in page.text and "nan" not in page.text.split()


def test_a_report_of_one_method_says_that_nothing_can_be_compared(tmp_path):
    write_report(campaign(tmp_path, spec("uniform", seeds=[0]), outcome))
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "nothing can be compared" in page.text


# --- hostile text -----------------------------------------------------------------------------------------------


def poisoned(folder, text, monkeypatch):
    """A campaign with the text wherever a file, an exception, a machine or a benchmark can write to."""
    made = spec(
        *("uniform", "paper", "last"),
        seeds=[0, 1],
        models=[{"name": "m", "model": text}],
        tasks=[{"name": "t", "data": text}],
    )

    def ended(content):
        if (content["method"]["name"], content["seed"]) == ("last", 1):
            return "failed", text
        scores = {"gradient_norm": [1.0, 2.0], text: [1.0, 2.0]}
        environment = {text: text, "device": text}
        return result(content, model_type=text, environment=environment, layer_scores=scores, layers=[1])

    campaign(folder, made, ended)
    items = ({text: 1.0, "b": 0.0}, {text: 0.0, "b": 0.0})
    evaluated(
        folder,
        made,
        lambda content: {
            text: benchmark(0.5, 0.0, *items),
            f"{text} loss": benchmark(2.5, 2.0, unit=text),
        },
        monkeypatch,
    )
    return folder


@pytest.fixture
def clean(tmp_path, monkeypatch):
    """The page of a campaign with nothing hostile in it."""
    return page_of(poisoned(tmp_path / "clean", "plain", monkeypatch))


def page_of(folder):
    record = campaign_record(folder)
    return render_campaign(record, {}, {name: shown(name, rows) for name, rows in record["tables"].items()})


@pytest.mark.parametrize("text", WORSE, ids=range(len(WORSE)))
def test_hostile_text_is_shown_as_text(clean, tmp_path, monkeypatch, text):
    bad = poisoned(tmp_path / "bad", text, monkeypatch)
    html = page_of(bad)
    wanted, page = Page(clean), Page(html)
    assert set(page.tags) == set(wanted.tags)
    assert {name for _, name, _ in page.attributes} == {name for _, name, _ in wanted.attributes}
    assert re.sub(r"\s+", " ", visible(text)) in page.text
    told = report_text(bad)
    assert not CONTROL.search(html) and not CONTROL.search(told)
    assert not re.search(r"(?<!\\)<", told)
    for name, rows in tables(bad).items():
        cells = list(csv.reader(io.StringIO(csv_text(rows))))
        assert len({len(row) for row in cells}) <= 1
        assert not any(cell.startswith(("=", "@", "+", "\t")) for row in cells for cell in row)
        assert latex(shown(name, rows)).isascii()


def test_all_hostile_text_at_once_is_written_and_drawn(tmp_path, monkeypatch):
    bad = poisoned(tmp_path / "bad", " ".join(WORSE), monkeypatch)
    write_report(bad)
    assert {path.name for path in tmp_path.iterdir()} == {"bad"}
    drawn = {path.name for path in (bad / "figures").iterdir()}
    assert drawn == {f"{name}.png" for name in (*FIGURES, "deltas_points", "benchmarks", "benchmarks_loss")}
    assert all(path.read_bytes().startswith(PNG) for path in (bad / "figures").iterdir())


def test_the_benchmark_writes_a_campaign_that_has_a_report(tmp_path):
    module = script("campaign_report/run.py")
    made = module.made_up(models=1, tasks=1, seeds=1)
    assert module.write_records(tmp_path, made, np.random.default_rng(0)) == 9 * 3 + 2 * 10 + 1
    assert "of 21 runs ended well." in write_report(tmp_path)


@pytest.mark.browser
def test_the_page_fits_a_phone(folder, tmp_path):
    page = tmp_path / "report.html"
    page.write_bytes((folder / "report.html").read_bytes())
    assert width_on_a_phone(page, tmp_path / "profile") <= 390


@pytest.mark.browser
def test_a_browser_opens_the_page_without_a_complaint(folder, tmp_path):
    dom, console = browse(folder / "report.html", tmp_path / "profile")
    assert "What was asked" in dom and dom.count("<img") == 6
    assert console == ""


@pytest.mark.browser
def test_hostile_text_does_nothing_in_a_browser_even_without_the_policy(tmp_path, monkeypatch):
    bad = poisoned(tmp_path / "bad", " ".join(WORSE), monkeypatch)
    write_report(bad)
    page = bad / "report.html"
    html = page.read_text(encoding="utf-8")
    page.write_text(re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", html), encoding="utf-8")
    dom, console = browse(page, tmp_path / "profile")
    assert "<title>owned</title>" not in dom
    assert console == ""
