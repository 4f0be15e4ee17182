"""Folders are published whole or not at all, and nothing is deleted that is not proved to be ours."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llavaforge import files
from llavaforge.files import replace_text
from llavaforge.folders import differences, not_published, publishing, remove_leftovers


def publish(folder: Path, text: str, overwrite: bool = False) -> None:
    with publishing(folder, overwrite=overwrite) as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "a.txt").write_text(text)


def leftover(destination: Path, kind: str, pid: int) -> Path:
    """A temporary folder as this machine's process `pid` names it."""
    folder = files.temporary_path(destination, kind)
    folder = folder.with_name(folder.name.replace(f"-{os.getpid()}-", f"-{pid}-"))
    folder.mkdir()
    (folder / "a.txt").write_text("half")
    return folder


@pytest.fixture
def dead() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_folder_appears_with_its_manifest_and_is_replaced_only_with_overwrite(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    publish(folder, "one")
    assert differences(folder) == [] and not_published(folder) == []
    with pytest.raises(FileExistsError):
        publish(folder, "two")
    assert (folder / "sub" / "a.txt").read_text() == "one"
    publish(folder, "two", overwrite=True)
    assert (folder / "sub" / "a.txt").read_text() == "two" and list(tmp_path.iterdir()) == [folder]


def test_an_error_in_the_block_leaves_what_was_there(tmp_path: Path) -> None:
    publish(tmp_path / "out", "one")
    with pytest.raises(RuntimeError), publishing(tmp_path / "out", overwrite=True) as temporary:
        (temporary / "b.txt").write_text("two")
        raise RuntimeError
    assert differences(tmp_path / "out") == [] and list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_overwrite_touches_no_neighbour(tmp_path: Path) -> None:
    for name in ("out.old", "out.new", ".tmp-1-out", ".out"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes").write_text("precious")
    publish(tmp_path / "out", "one")
    publish(tmp_path / "out", "two", overwrite=True)
    remove_leftovers(tmp_path)
    for name in ("out.old", "out.new", ".tmp-1-out", ".out"):
        assert (tmp_path / name / "notes").read_text() == "precious"


@pytest.mark.parametrize("stranger", ["notes.txt", ".hidden", "runs/metrics.jsonl", "sub/b.txt", "sub/a.txt"])
def test_a_folder_with_anything_else_inside_is_not_replaced(stranger: str, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    publish(folder, "one")
    (folder / stranger).parent.mkdir(exist_ok=True)
    (folder / stranger).write_text("precious")
    assert not_published(folder)[-1] == stranger
    with pytest.raises(FileExistsError):
        publish(folder, "two", overwrite=True)
    assert (folder / stranger).read_text() == "precious" and list(tmp_path.iterdir()) == [folder]


def test_what_comes_while_the_new_folder_is_made_stays(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    publish(folder, "one")
    with pytest.raises(FileExistsError), publishing(folder, overwrite=True) as temporary:
        (temporary / "b.txt").write_text("two")
        (folder / "notes.txt").write_text("precious")
    assert (folder / "notes.txt").read_text() == "precious"


def test_a_folder_without_a_manifest_or_with_a_broken_one_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    assert not_published(tmp_path) == ["no readable manifest.json"]
    for broken in ("{", "[]", '{"files": 3}', '{"files": {"a.txt": 3}}'):
        (tmp_path / "manifest.json").write_text(broken)
        assert not_published(tmp_path), broken


def test_only_leftovers_of_dead_processes_of_this_machine_are_removed(tmp_path: Path, dead: int) -> None:
    mine = [leftover(tmp_path / "out", "new", dead), leftover(tmp_path / "text", "new", os.getpid())]
    alive = leftover(tmp_path / "out", "new", os.getppid())
    elsewhere = leftover(tmp_path / "out", "new", dead + 1)
    elsewhere = elsewhere.rename(elsewhere.with_name(elsewhere.name.replace(files.machine(), "00000000")))
    users = tmp_path / ".tmp-mine"
    users.mkdir()
    remove_leftovers(tmp_path)
    assert not any(path.exists() for path in mine) and alive.exists() and elsewhere.exists() and users.exists()


def test_leftovers_of_another_name_stay_while_one_is_written(tmp_path: Path, dead: int) -> None:
    other = leftover(tmp_path / "another", "new", dead)
    publish(tmp_path / "out", "one")
    assert other.exists()


def test_a_folder_that_was_moved_aside_for_one_that_never_came_is_put_back(tmp_path: Path, dead: int) -> None:
    publish(tmp_path / "out", "one")
    old = files.temporary_path(tmp_path / "out", "old")
    (tmp_path / "out").rename(old.with_name(old.name.replace(f"-{os.getpid()}-", f"-{dead}-")))
    leftover(tmp_path / "out", "new", dead)
    remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == [tmp_path / "out"] and differences(tmp_path / "out") == []


def test_a_linked_folder_is_replaced_where_it_is(tmp_path: Path) -> None:
    publish(tmp_path / "real", "one")
    (tmp_path / "link").symlink_to("real")
    publish(tmp_path / "link", "two", overwrite=True)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "sub" / "a.txt").read_text() == "two"


def test_a_small_file_is_replaced_whole(tmp_path: Path) -> None:
    for text in ("one", "two"):
        replace_text(tmp_path / "latest", text)
        assert (tmp_path / "latest").read_text() == text and list(tmp_path.iterdir()) == [tmp_path / "latest"]
