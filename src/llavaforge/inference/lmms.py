"""Published benchmarks by lmms-eval, with its own model `llava_hf` on our folder.

Comes in: a plain model folder and names of lmms-eval's tasks. Goes out: its numbers; its log and samples in a folder.

lmms-eval is a program of its own, often in an environment of its own; it goes on after errors of single samples, which
count as wrong answers then. Its log is searched for them.
"""

import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from llavaforge.device import pick_device
from llavaforge.errors import RunFailed, UserError

logger = logging.getLogger(__name__)

_LAUNCHER = re.compile(r"(((LOCAL|GROUP|ROLE)_)?(RANK|WORLD_SIZE)|ROLE_NAME|(MASTER|TORCHELASTIC|SLURM)_.*)$")
LOG = "lmms-eval.log"
_INSTALL = "pip install 'llavaforge[lmms]', or name the Python of its own environment: --lmms_python PATH"
_SWALLOWED = re.compile(r"Error .* in generating|Error during evaluation|Traceback \(most recent call last\)")
_NAMES_ERROR = re.compile(r"^.*\b(?:\w+Error|Error \S.*)\b.*$", re.M)
_HAS_IT = "import importlib.util, sys; sys.exit(not importlib.util.find_spec('lmms_eval'))"


def run_lmms(
    model: Path, tasks: Sequence[str], output_dir: Path, max_samples: int | None, bf16: bool,
    python: Path | None, include_path: Path | None,
) -> dict[str, dict[str, float]]:  # fmt: skip
    """Run lmms-eval, and return each task's numbers by name.

    Args:
        model: a folder that plain transformers opens.
        tasks: by lmms-eval's names, such as `pope`.
        output_dir: gets the log, the results and the samples.
        max_samples: of each task.
        bf16: compute in bfloat16.
        python: that has lmms-eval; None: this one.
        include_path: a folder with the user's own tasks.

    Raises:
        UserError: the folder is no plain model, or lmms-eval is not there.
        RunFailed: it failed, or went on after an error.
    """
    check_lmms(model, python)
    output_dir.mkdir(parents=True, exist_ok=True)
    device, dtype = pick_device().type, "bfloat16" if bf16 else "float32"
    command = [str(python or sys.executable), "-m", "lmms_eval", "eval", "--model", "llava_hf"]
    command += ["--model_args", f"pretrained={model.absolute()},device_map={device},dtype={dtype}", "--device", device]
    command += ["--tasks", ",".join(tasks), "--batch_size", "1", "--output_path", str(output_dir)]  # it takes no more
    command += ["--log_samples", *(["--limit", str(max_samples)] if max_samples else [])]
    command += ["--include_path", str(include_path)] if include_path else []
    before = set(output_dir.rglob("*_results.json"))
    logger.info("lmms-eval: %s (its log: %s)", ", ".join(tasks), output_dir / LOG)
    with (output_dir / LOG).open("wb") as log:
        done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=_environment())
    text = (output_dir / LOG).read_text(errors="replace")
    new = sorted(set(output_dir.rglob("*_results.json")) - before)
    if found := _SWALLOWED.search(text):
        told = re.sub(r"\x1b\[\d+m", "", [found[0], *_NAMES_ERROR.findall(text)][-1].strip())
        raise RunFailed(f"lmms-eval met an error, so its numbers are not right: {told:.300} See {output_dir / LOG}")
    if done.returncode or not new:
        raise RunFailed(f"lmms-eval ended with {done.returncode} and no results. Its log: {output_dir / LOG}")
    results = json.loads(new[-1].read_text())["results"]
    return {task: _numbers(values) for task, values in results.items()}


def check_lmms(model: Path, python: Path | None) -> None:
    """Check that lmms-eval can open a model.

    Raises:
        UserError: it cannot.
    """
    if not (model / "config.json").is_file():
        raise UserError(f"--lmms opens plain model folders, and {model} is none. `llavaforge export` writes one of it.")
    command = [str(python or sys.executable), "-c", _HAS_IT]
    try:
        missing = subprocess.run(command, stderr=subprocess.DEVNULL).returncode
    except OSError as error:
        raise UserError(f"--lmms_python {python}: cannot be started ({error.strerror}).") from None
    if missing:
        raise UserError(f"--lmms needs lmms-eval: {_INSTALL}.")


def _environment() -> dict[str, str]:
    """Return the environment of a process by itself: a launcher's variables would let it wait for others."""
    return {name: value for name, value in os.environ.items() if not _LAUNCHER.match(name)} | {"NO_COLOR": "1"}


def _numbers(values: dict[str, object]) -> dict[str, float]:
    """Return a task's numbers by short names, `exact` for `exact,none`; its standard errors stay in its own file."""
    numbers = {key: float(value) for key, value in values.items() if isinstance(value, int | float)}
    return {key.removesuffix(",none"): value for key, value in numbers.items() if "_stderr" not in key}
