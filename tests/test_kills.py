"""kill -9 at every system call of the publisher: afterwards there is the old state or the new one, and it goes on."""

import itertools
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llavaforge.folders import differences, remove_leftovers

SCRIPT = str(Path(__file__).with_name("publish_once.py"))
# All calls by which the publisher changes a disk.
CALLS = ("openat", "write", "fsync", "rename", "mkdir", "unlinkat", "rmdir", "unlink", "chmod")

pytestmark = pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")


def publish(folder: Path, content: str, call: str = "", number: int = 0) -> int:
    inject = ["strace", "-f", "-o", "/dev/null", "-e", f"inject={call}:signal=SIGKILL:when={number}"] if call else []
    environment = {"PYTHONDONTWRITEBYTECODE": "1", "PATH": "/usr/bin:/bin"}
    return subprocess.run([*inject, sys.executable, SCRIPT, str(folder), content], env=environment).returncode


def content_of(folder: Path) -> str | None:
    """What a published folder holds: all of one state, or it is not there."""
    if not folder.exists():
        return None
    assert differences(folder) == []
    (content,) = {path.read_text()[0] for path in folder.iterdir() if path.name != "manifest.json"}
    return content


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    assert publish(folder, "a") == publish(folder, "b") == 0
    return folder


@pytest.fixture(scope="module")
def first_calls(published: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """How many calls of each kind come before the publisher's own: those of Python's start."""
    log = tmp_path_factory.mktemp("log") / "calls"
    folder = Path(shutil.copytree(published, log.parent / "folder"))
    command = ["strace", "-f", "-o", str(log), sys.executable, SCRIPT, str(folder), "c"]
    subprocess.run(command, check=True, env={"PYTHONDONTWRITEBYTECODE": "1", "PATH": "/usr/bin:/bin"})
    names = [line.split("(")[0].split()[-1] for line in log.read_text().splitlines() if "(" in line]
    own = next(
        at for at, line in enumerate(log.read_text().splitlines()) if str(folder) in line and "execve" not in line
    )
    return {call: names[:own].count(call) for call in CALLS}


@pytest.mark.parametrize("call", CALLS)
def test_killed_at_any_call_a_publisher_leaves_the_old_state_or_the_new_one(
    call: str, published: Path, first_calls: dict[str, int], tmp_path: Path
) -> None:
    for number in itertools.count(first_calls[call] + 1):
        folder = Path(shutil.copytree(published, tmp_path / str(number)))
        code = publish(folder, "c", call, number)
        remove_leftovers(folder)  # what the next start does
        assert content_of(folder / "model") in ("b", "c")
        latest = (folder / "latest").read_text()
        assert latest in ("checkpoint-b", "checkpoint-c") and content_of(folder / latest) == latest[-1]
        assert content_of(folder / "checkpoint-b") == "b"
        assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]
        if code == 0:  # past the last call of this kind
            assert content_of(folder / "model") == "c"
            return
        assert publish(folder, "d") == 0 and content_of(folder / "model") == "d"
        shutil.rmtree(folder)
