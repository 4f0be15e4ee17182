"""kill -9 at system calls that were drawn of real runs: started again, each ends as an undisturbed one does.

All calls of the publisher alone are swept in `test_kills.py`. Here the processes are whole ones, of every train type,
of a LoRA that is merged between stages, of `export --overwrite` and of `customize-model --overwrite`.
"""

import ctypes
import multiprocessing
import os
import random
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from llavaforge.cli import main
from llavaforge.folders import differences
from train_tools import TRAIN_TYPES, arguments_of, train_config
from warm import WarmProcess, command_line

NUM_KILLS = int(os.environ.get("NUM_KILLS", "2"))  # of each kind of run; a soak draws more
# By which a process changes a disk, and `openat`, which most often comes before.
CALLS = "openat,write,pwrite64,fsync,rename,mkdir,unlink,unlinkat,rmdir,symlink,chmod,ftruncate"
ANY_PROCESS = ctypes.c_ulong(-1)
PR_SET_PTRACER = 0x59616D61  # prctl(2): else some systems let a parent alone trace a process

pytestmark = pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")


def run_when_told(arguments: list[str], folder: Path, told: "Connection[Any, Any]") -> int:
    ctypes.CDLL(None).prctl(PR_SET_PTRACER, ANY_PROCESS)
    os.chdir(folder)
    told.send("ready")
    told.recv()
    return command_line(arguments)


def traced(arguments: list[str], folder: Path, *options: str) -> int:
    """Run a verb under strace in a process of its own; return its exit code."""
    ours, theirs = multiprocessing.Pipe()
    process = WarmProcess(run_when_told, arguments, folder, theirs)
    assert ours.recv() == "ready"
    command = ["strace", "-f", "-y", "-p", str(process.pid), *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as tracer:
        assert tracer.stderr is not None and "attached" in tracer.stderr.readline()
        ours.send("go")
        tracer.communicate(timeout=300)
    return process.wait(60)


def own_calls(log: Path, folder: Path) -> list[tuple[str, int]]:
    """The calls that name something below `folder`: which call, and the how manieth of its kind in its thread."""
    found, seen = [], Counter[tuple[str, str]]()
    for line in log.read_text(errors="replace").splitlines():
        if match := re.match(r"(\d+) +(\w+)\(", line):
            seen[match.group(1, 2)] += 1
            if str(folder) in line:
                found.append((match[2], seen[match.group(1, 2)]))
    return found


def tensors_of(folder: Path) -> dict[str, object]:
    return {
        f"{path.name} {name}": tensor.tolist()
        for path in folder.glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


def check_kills(arguments: list[str], folder: Path, result: str, begin: Callable[[], None], seed: int) -> None:
    """Kill a verb at calls that are drawn, run it again, and compare what it leaves with what it leaves undisturbed."""
    begin()
    log = folder.parent / "calls"
    assert traced(arguments, folder, "-o", str(log), "-e", f"trace={CALLS}") == 0
    undisturbed, calls = tensors_of(folder / result), own_calls(log, folder)
    assert undisturbed and len(calls) > 20
    num_killed = 0
    for call, number in random.Random(seed).sample(calls, NUM_KILLS):
        begin()
        (folder / "notes.txt").write_text("mine")
        kill = f"inject={call}:signal=SIGKILL:when={number}"
        code = traced(arguments, folder, "-o", "/dev/null", "-e", kill)
        assert code in (0, -9), (call, number, code)  # 0: a thread did what another did before
        num_killed += code == -9
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            assert main(arguments) == 0, (call, number)
        assert differences((folder / result).resolve()) == [], (call, number)
        assert tensors_of(folder / result) == undisturbed, (call, number)
        assert (folder / "notes.txt").read_text() == "mine"
        left = [path for path in folder.rglob(".llavaforge-*") if not path.name.endswith(".lock")]
        assert left == [], (call, number)
    assert num_killed


def emptied(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()


@pytest.mark.parametrize("train_type", TRAIN_TYPES)
def test_a_run_that_is_killed_ends_as_the_undisturbed_one(
    train_type: str, tiny_llava: Path, shapes: Path, tmp_path: Path
) -> None:
    config = train_config(
        tiny_llava, shapes / "train", Path("run"), train_type=train_type, max_steps=3, save_steps=1, save_total_limit=2
    )
    folder = tmp_path / "work"
    check_kills(arguments_of(config), folder, "run/final", lambda: emptied(folder), 1)


def test_stages_with_a_lora_that_is_merged_between_them(tiny_llava: Path, shapes: Path, tmp_path: Path) -> None:
    values = train_config(tiny_llava, shapes / "train", Path("run"), max_steps=1).model_dump(
        mode="json", exclude_unset=True, exclude={"train_type"}
    )
    stages = [{"name": "one", "train_type": "use_lora"}, {"name": "two", "train_type": "projector"}]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values | {"stages": stages}))
    folder = tmp_path / "work"
    arguments = ["train", str(tmp_path / "recipe.yaml")]
    check_kills(arguments, folder, "run/final", lambda: emptied(folder), 2)


@pytest.fixture
def joined_twice(tiny_clip: Path, tiny_lm: Callable[[str], Path], tmp_path: Path) -> tuple[list[str], Path]:
    arguments = ["customize-model", f"--vision_tower={tiny_clip}", f"--language_model={tiny_lm('qwen2')}"]
    assert main([*arguments, f"--output_dir={tmp_path / 'old' / 'out'}", "--seed=1"]) == 0
    return [*arguments, "--output_dir=out", "--overwrite"], tmp_path / "old"


def test_a_model_that_replaces_another(joined_twice: tuple[list[str], Path], tmp_path: Path) -> None:
    (arguments, old), folder = joined_twice, tmp_path / "work"

    def begin() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(old, folder)

    check_kills(arguments, folder, "out", begin, 3)


def test_an_export_that_replaces_another(
    tiny_llava: Path, joined_twice: tuple[list[str], Path], tmp_path: Path
) -> None:
    (_, old), folder = joined_twice, tmp_path / "work"

    def begin() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(old, folder)

    check_kills(["export", f"--checkpoint={tiny_llava}", "--output_dir=out", "--overwrite"], folder, "out", begin, 4)
