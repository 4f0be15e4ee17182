"""Arrows point one way, and the command line starts light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "src" / "llavaforge"

# Every room, from the ground up: a file imports its own room and those below. Rooms of a floor do not know each other.
FLOORS: list[set[str]] = [
    {"clock", "device", "errors", "progress", "results", "version"},
    {"files"},
    {"folders"},
    {"config", "processes", "report"},
    {"model_folder"},
    {"data"},
    {"model", "gguf_folder"},
    {"engine"},
    {"checkpoint", "answers"},
    {"training", "inference", "data_check", "data_preview", "join", "sbatch"},
    {"starter", "machine", "forecast"},
    {"cli"},
    {"comparison"},
    {"__init__", "__main__"},
]
FLOORS_OF_DATA: list[set[str]] = [
    {"faults"},
    {"storage", "pixels"},
    {"rows"},
    {"text"},
    {"index"},
    {"order"},
    {"load"},
]  # fmt: skip


def imports_of(path: Path) -> set[str]:
    """Every module that a file imports, wherever in it; of `from x import y` both x and x.y."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def floor_of(room: str, floors: list[set[str]]) -> int:
    return next(number for number, rooms in enumerate(floors) if room in rooms)


def check_arrows(folder: Path, prefix: str, floors: list[set[str]]) -> None:
    for path in sorted(folder.rglob("*.py")):
        room = path.relative_to(folder).parts[0].removesuffix(".py")
        if room == "__init__" and folder != PACKAGE:
            continue
        for name in imports_of(path):
            if not name.startswith(prefix):
                continue
            other = name.removeprefix(prefix).split(".")[0]
            if other == room:
                continue
            assert any(other in rooms for rooms in floors), f"{path.relative_to(PACKAGE)} imports {name}: no room"
            assert floor_of(other, floors) < floor_of(room, floors), f"{path.relative_to(PACKAGE)} imports {name}"


def test_no_arrow_runs_upwards() -> None:
    check_arrows(PACKAGE, "llavaforge.", FLOORS)
    check_arrows(PACKAGE / "data", "llavaforge.data.", FLOORS_OF_DATA)


def test_every_room_has_a_floor() -> None:
    for folder, floors in ((PACKAGE, FLOORS), (PACKAGE / "data", FLOORS_OF_DATA)):
        rooms = {path.stem for path in folder.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
        assert rooms | {"__init__"} == set().union(*floors) | {"__init__"}


def test_no_two_modules_import_each_other() -> None:
    modules = {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
    arrows = {name: imports_of(path) & modules.keys() for name, path in modules.items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail[trail.index(name) :], name))
        if name not in done:
            for other in arrows[name]:
                visit(other, (*trail, name))
            done.add(name)

    for name in modules:
        visit(name, ())


@pytest.mark.parametrize(
    "path", [p for p in PACKAGE.rglob("*.py") if p.parent.name not in ("engine", "processes")], ids=str
)
def test_distributed_code_sits_behind_the_engine(path: Path) -> None:
    forbidden = {
        name for name in imports_of(path) if name.split(".")[0] == "deepspeed" or name.startswith("torch.distributed")
    }
    assert not forbidden


def test_the_publisher_imports_no_torch() -> None:
    code = "import sys, llavaforge.folders; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["compare", "--help"], ["data", "--help"]])
def test_help_imports_neither_torch_nor_transformers(arguments: list[str]) -> None:
    code = (
        "import sys; from llavaforge.cli import main; code = main(sys.argv[1:]); "
        "sys.exit(code or any(name in sys.modules for name in ('torch', 'transformers', 'pyarrow')))"
    )
    assert subprocess.run([sys.executable, "-c", code, *arguments], stdout=subprocess.DEVNULL).returncode == 0
