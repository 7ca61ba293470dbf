"""How the code is laid out: imports point one way, and nothing grows too long to be read."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
FILES = sorted((ROOT / "r4b_jax").rglob("*.py"))
# A room imports from itself and from those before it.
ROOMS = (
    "config",
    "rules",
    "common",
    "models",
    "data",
    "decoding",
    "evaluation",
    "serving",
    "training",
    "rl",
    "curation",
    "scaling",
    "main",
    "convert",
    "chat",
    "plan",
    "curate",
    "calibrate",
    "evaluate",
    "serve",
    "__main__",
    "__init__",
)
MAX_FUNCTION_LINES, MAX_FILE_LINES = 80, 450
LOOPS = {"training/loop.py", "rl/loop.py"}


def name(path: pathlib.Path) -> str:
    return path.relative_to(ROOT / "r4b_jax").as_posix()


def room(dotted: str) -> str:
    """`r4b_jax.models.r4b` -> `models`; a folder's `__main__` is a front, not of its room."""
    if dotted.endswith(".__main__"):
        return "__main__"
    return (dotted.split(".") + ["__init__"])[1]


def imported(path: pathlib.Path) -> list[str]:
    """Every module a file imports, also inside functions."""
    modules = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name(path)}: relative imports hide the direction"
            modules += [f"{node.module}.{alias.name}" for alias in node.names]
    return modules


def test_every_file_is_in_a_room():
    """A new room must take its place in the order."""
    rooms = {room("r4b_jax." + name(p).removesuffix(".py").replace("/", ".")) for p in FILES}
    assert rooms <= set(ROOMS)


@pytest.mark.parametrize("path", FILES, ids=name)
def test_imports_only_point_up_the_list(path):
    """One direction: any room can be read, and changed, without those that come after it."""
    own = ROOMS.index(room("r4b_jax." + name(path).removesuffix(".py").replace("/", ".")))
    below = [
        module
        for module in imported(path)
        if module.split(".")[0] == "r4b_jax" and ROOMS.index(room(module)) > own
    ]
    assert below == []


@pytest.mark.parametrize("path", FILES, ids=name)
def test_the_package_knows_no_config_file_and_no_experiment(path):
    """A library that imports its users cannot be used by anyone else."""
    roots = {module.split(".")[0] for module in imported(path)}
    assert not roots & {"configs", "experiments", "tests", "benchmarks"}


@pytest.mark.parametrize("path", FILES, ids=name)
def test_functions_and_files_stay_short_enough_to_be_read(path):
    """The tail is where codebases die."""
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_FILE_LINES
    long = {
        node.name: node.end_lineno - node.lineno + 1
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef)
        and node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES
    }
    assert long == {}


def test_only_the_two_loops_loop_over_steps():
    """Whoever looks for the training loop must find one, and there is one of each kind."""
    found = {
        name(path)
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.For) and getattr(node.target, "id", None) == "step"
    }
    assert found == LOOPS
