"""The examples run as a reader runs them, and what README.md imports exists."""

import ast
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]
SCRIPT = CHECKOUT / "examples" / "quick_start.py"
NOTEBOOK = CHECKOUT / "examples" / "quick_start.ipynb"
README = CHECKOUT / "README.md"


def check_story(output):
    """What either example must have printed: scores, the choice, the census, falling losses, the measured depth."""
    scores = [float(score) for score in re.findall(r"^layer \d: score ([\d.]+), standard error [\d.]+$", output, re.M)]
    assert len(scores) == 6 and min(scores) > 0
    (selected,) = re.findall(r"^selected layers: \[(\d), (\d), (\d)\]$", output, re.M)
    best = sorted(range(6), key=lambda layer: -scores[layer])[:3]
    assert sorted(map(int, selected)) == sorted(best)
    assert "adapters attached: 21\n" in output
    assert re.search(
        r"^LlamaForCausalLM: layers? .*, backward stops at [1-5], predicted \d\.\d\dx, keeps", output, re.M
    )
    adapted = {int(layer) for layer in re.findall(r"^census: model\.layers\.(\d)\.\S+, rank \d+, alpha", output, re.M)}
    (losses,) = re.findall(r"^losses: (.+)$", output, re.M)
    losses = [float(loss) for loss in losses.split()]
    assert len(losses) == 12 and losses[-1] < losses[0]
    assert f"backward stopped at layer {min(adapted)}\n" in f"{output}\n"


def import_path():
    """What this process can import, for another process in another folder."""
    return os.pathsep.join(str(Path(entry).resolve()) for entry in sys.path if entry)


@pytest.mark.slow
def test_the_quick_start_script_runs_and_tells_the_whole_story(tmp_path):
    environment = {**os.environ, "PYTHONPATH": import_path()}
    done = subprocess.run([sys.executable, SCRIPT], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    check_story(done.stdout)
    assert list(tmp_path.iterdir()) == []  # nothing is left behind in the reader's folder


@pytest.mark.slow
def test_the_quick_start_notebook_runs_and_tells_the_same(tmp_path, monkeypatch):
    pytest.importorskip("ipykernel", reason="ipykernel is not installed: no kernel to run the notebook in")
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed: the notebook cannot be read")
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed: the notebook cannot be run")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    monkeypatch.setenv("PYTHONPATH", import_path())
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3").execute(cwd=str(tmp_path))
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    check_story("".join(output.text for output in outputs if output.get("name") == "stdout"))


def test_the_notebook_is_the_script_and_is_stored_without_outputs():
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed: the notebook cannot be read")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in cells)
    code = ast.parse("\n".join(cell.source for cell in cells))
    script = ast.parse(SCRIPT.read_text(encoding="utf-8"))
    assert ast.unparse(code) == ast.unparse(script.body[1:])  # all but the docstring


def missing_names(source):
    """Dotted names that the source imports, or takes from an imported module of ours, and that do not exist."""
    tree, modules, wanted = ast.parse(source), {}, []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                modules[alias.asname or alias.name.partition(".")[0]] = alias.name
                wanted.append((alias.name, None))
        elif isinstance(node, ast.ImportFrom):
            wanted += [(node.module, alias.name) for alias in node.names]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = modules.get(node.value.id, "")
            if module.partition(".")[0] == "aletheia_lora":
                wanted.append((module, node.attr))
    missing = []
    for module, name in wanted:
        try:
            found = importlib.import_module(module)
        except ImportError:
            missing.append(module)
            continue
        if name is not None and not hasattr(found, name):
            missing.append(f"{module}.{name}")
    return missing


def test_the_first_python_example_of_the_readme_compiles_and_imports_what_exists():
    if not README.exists():
        pytest.skip("there is no README.md")
    block = re.search(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.M | re.S)
    assert block is not None, "README.md has no python example"
    compile(block[1], "README.md", "exec")
    assert missing_names(block[1]) == []


@pytest.mark.parametrize(
    ("source", "missing"),
    [
        ("import aletheia_lora as aletheia\naletheia.plan", []),
        ("from aletheia_lora import gradient_probe, probe_gradient", ["aletheia_lora.probe_gradient"]),
        ("import aletheia_lora\naletheia_lora.plam(1)", ["aletheia_lora.plam"]),
        ("import no_such_library", ["no_such_library"]),
    ],
)
def test_a_name_that_does_not_exist_is_noticed(source, missing):
    assert missing_names(source) == missing


def test_every_function_that_the_method_page_names_exists():
    page = (CHECKOUT / "docs" / "method.md").read_text(encoding="utf-8")
    named = re.findall(r"`([\w/]+)\.py:([\w.]+)`", page)
    assert len(named) > 20
    for file, name in named:
        found = importlib.import_module(f"aletheia_lora.{file.replace('/', '.')}")
        for part in name.split("."):
            assert hasattr(found, part), f"docs/method.md names {file}.py:{name}"
            found = getattr(found, part)


@pytest.mark.parametrize("table", ["scores.SCORES", "selection.STRATEGIES", "allocation.ALLOCATIONS"])
def test_the_method_page_has_every_entry_of_every_table(table):
    page = (CHECKOUT / "docs" / "method.md").read_text(encoding="utf-8")
    first_cells = "\n".join(re.findall(r"^\| (.+?) \|", page, re.M))
    module, name = table.split(".")
    for entry in getattr(importlib.import_module(f"aletheia_lora.{module}"), name):
        assert f"`{entry}`" in first_cells, f"docs/method.md lacks {entry} of {table}"


def test_the_architecture_page_has_every_file_of_the_package_in_its_tree():
    page = (CHECKOUT / "docs" / "architecture.md").read_text(encoding="utf-8")
    (tree,) = re.findall(r"^src/aletheia_lora/\n(.*?)^```", page, re.M | re.S)
    folder, drawn = "", set()
    for indent, name in re.findall(r"^( +)([\w.]+/?)(?: |$)", tree, re.M):
        if name.endswith("/"):
            folder = name
        else:
            drawn.add((folder if len(indent) > 2 else "") + name)
    package = CHECKOUT / "src" / "aletheia_lora"
    files = {file.relative_to(package).as_posix() for file in package.rglob("*") if file.is_file()}
    assert drawn == {file for file in files if "__pycache__" not in file and not file.endswith(".pyc")}
