"""`evaluate --lmms` runs another program: what it says is passed on, and what it swallows is found.

The program here is a small one of the same name; the real one is asked by `make test-clients`.
"""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from llavaforge.config.load import build
from llavaforge.config.schema import EvaluateConfig
from llavaforge.errors import RunFailed, UserError
from llavaforge.inference.evaluate import evaluate

PROGRAM = """
import json, os, pathlib, sys
arguments = sys.argv[1:]
given = dict(zip(arguments[1::2], arguments[2::2]))
print("arguments", json.dumps(arguments))
said = os.environ.get("SAYS", "")
print(said)
print("launched", sorted(name for name in os.environ if name in ("MASTER_ADDR", "LOCAL_RANK")))
if "no results" not in said:
    folder = pathlib.Path(given["--output_path"]) / "model"
    folder.mkdir(parents=True, exist_ok=True)
    numbers = {"alias": "pope", "pope_accuracy,none": 0.875, "pope_accuracy_stderr,none": 0.01, "n,none": "N/A"}
    results = {"results": {task: numbers for task in given["--tasks"].split(",")}}
    (folder / f"{len(list(folder.iterdir()))}_results.json").write_text(json.dumps(results))
sys.exit(3 if "no results" in said else 0)
"""


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """A Python that finds the small program."""
    package = tmp_path / "site" / "lmms_eval"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(PROGRAM)
    script = tmp_path / "python"
    script.write_text(f'#!/bin/sh\nPYTHONPATH={package.parent} exec {sys.executable} "$@"\n')
    script.chmod(0o755)
    return script


def config_of(model: Path, tmp_path: Path, python: Path, **options: Any) -> EvaluateConfig:
    given = {"model_name_or_path": str(model), "lmms": "pope,gqa", "output_dir": tmp_path / "out", "bf16": False}
    return build(EvaluateConfig, {**given, "lmms_python": str(python), "max_samples": 7, **options}, "evaluate")


def test_numbers_are_passed_on(tiny_llava: Path, tmp_path: Path, python: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(tiny_llava, tmp_path, python)
    monkeypatch.setenv("MASTER_ADDR", "nowhere")  # of a launcher: it would wait for other processes
    monkeypatch.setenv("LOCAL_RANK", "0")
    for _ in range(2):  # the newest results count
        found = evaluate(config)
    assert found["lmms"] == {"pope": {"pope_accuracy": 0.875}, "gqa": {"pope_accuracy": 0.875}}
    assert (found["num_samples"], found["loss"]) == (0, None)
    log = (tmp_path / "out" / "lmms-eval" / "lmms-eval.log").read_text()
    assert "launched []" in log
    told = json.loads(log.partition("arguments ")[2].splitlines()[0])
    assert told[:3] == ["eval", "--model", "llava_hf"] and told[-3:] == ["--log_samples", "--limit", "7"]
    assert f"pretrained={tiny_llava.absolute()},device_map=cpu,dtype=float32" in told


@pytest.mark.parametrize(
    ("says", "told"),
    [
        ("12:00 | ERROR - Error CUDA out of memory in generating", "CUDA out of memory in generating"),
        ("Traceback (most recent call last):\nKeyError: 'x'", "KeyError: 'x'"),
        ("no results", "ended with 3 and no results"),
    ],
)
def test_errors_that_it_swallows_end_the_evaluation(
    tiny_llava: Path, tmp_path: Path, python: Path, monkeypatch: pytest.MonkeyPatch, says: str, told: str
) -> None:
    monkeypatch.setenv("SAYS", says)
    with pytest.raises(RunFailed, match=told):
        evaluate(config_of(tiny_llava, tmp_path, python))


def test_what_it_cannot_open_or_find_is_the_users(tiny_llava: Path, tmp_path: Path, python: Path) -> None:
    with pytest.raises(UserError, match="opens plain model folders"):
        evaluate(config_of(tmp_path, tmp_path, python))
    with pytest.raises(UserError, match=r"needs lmms-eval: pip install 'llavaforge\[lmms\]'"):
        evaluate(config_of(tiny_llava, tmp_path, Path(sys.executable)))
    with pytest.raises(UserError, match="cannot be started"):
        evaluate(config_of(tiny_llava, tmp_path, tmp_path / "no-python"))
    with pytest.raises(UserError, match="give data_path"):
        config_of(tiny_llava, tmp_path, python, lmms=[])
