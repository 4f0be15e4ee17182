"""Arrows point one way, and the command line starts light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "src" / "llavaforge"


def imports_of(path: Path) -> set[str]:
    """Every module that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def files(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((PACKAGE / folder).rglob("*.py"))]


@pytest.mark.parametrize("path", [p for p in PACKAGE.rglob("*.py") if p.parent.name != "engine"], ids=str)
def test_distributed_code_sits_behind_the_engine(path: Path) -> None:
    forbidden = {
        name for name in imports_of(path) if name.split(".")[0] == "deepspeed" or name.startswith("torch.distributed")
    }
    assert not forbidden


@pytest.mark.parametrize(
    ("folder", "later"),
    [
        ("config", ["data", "model", "engine", "checkpoint", "train", "use", "join", "model_folder"]),
        ("data", ["model", "engine", "train", "use", "join", "model_folder"]),
        ("model_folder", ["engine", "train", "use", "join"]),
        ("join", ["data", "engine", "train", "use"]),
        ("model", ["engine", "train", "use", "checkpoint"]),
        ("engine", ["checkpoint", "train", "use", "join", "model_folder"]),
        ("checkpoint", ["train", "use"]),
        ("train", ["use"]),
        ("report", ["engine", "train", "use", "join", "checkpoint"]),
    ],
)  # fmt: skip
def test_a_stage_does_not_know_the_later_ones(folder: str, later: list[str]) -> None:
    for path in files(folder):
        known = {name.split(".")[1] for name in imports_of(path) if name.startswith("llavaforge.")}
        assert not known & set(later), f"{path.name} imports {sorted(known & set(later))}"


def test_the_publisher_imports_no_torch() -> None:
    code = "import sys, llavaforge.checkpoint.publish; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["data", "--help"]])
def test_help_imports_neither_torch_nor_transformers(arguments: list[str]) -> None:
    code = (
        "import sys; from llavaforge.cli import main; code = main(sys.argv[1:]); "
        "sys.exit(code or any(name in sys.modules for name in ('torch', 'transformers', 'pyarrow')))"
    )
    assert subprocess.run([sys.executable, "-c", code, *arguments], stdout=subprocess.DEVNULL).returncode == 0


def test_every_verb_is_a_function_of_the_package_and_modules_import_normally() -> None:
    code = (
        "from llavaforge import cli\nimport llavaforge\n"
        "assert all(callable(getattr(llavaforge, verb.split()[-1].replace('-', '_'))) for verb in cli.VERBS)\n"
        "try:\n    llavaforge.make_shapes(output_dir='x', num_sample=3)\n"
        "except llavaforge.errors.UserError as error:\n    assert 'num_samples' in str(error)\n"
        "else:\n    raise SystemExit(1)\n"
        "import llavaforge.train.run\n"  # binds the package in place of the function
        "for _ in range(2):\n    try:\n        llavaforge.train(data_path='x')\n"
        "    except llavaforge.errors.UserError as error:\n        assert 'model_name_or_path' in str(error)\n"
        "    else:\n        raise SystemExit(1)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
