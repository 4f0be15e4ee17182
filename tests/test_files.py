"""A file of the user's is never replaced, whatever its name was given for; one of ours is, whole or not at all."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from llavaforge.cli import main
from llavaforge.files import append_line, read_json_lines, replace_text, to_json
from llavaforge.folders import publishing, set_aside

PRECIOUS = "precious\n"
Arguments = Callable[[Path, Path, Path], list[str]]

# By the file that is written: how it is asked for, given a model, data and a folder.
WRITTEN: dict[str, Arguments] = {
    "report.html": lambda model, data, out: ["data", "check", f"--data_path={data}", f"--report={out}"],
    "findings.jsonl": lambda model, data, out: ["data", "check", f"--data_path={data}", f"--report={out}"],
    "list.jsonl": lambda model, data, out: [
        "data", "check", f"--data_path={data}", f"--quarantine={out / 'list.jsonl'}"
    ],
    "page.html": lambda model, data, out: [
        "data", "preview", f"--data_path={data}", f"--model_name_or_path={model}", f"--output={out / 'page.html'}"
    ],
    "samples.jsonl": lambda model, data, out: [
        "evaluate", f"--data_path={data}", f"--model_name_or_path={model}", f"--output_dir={out}", "--max_samples=2",
        "--dataloader_num_workers=0", "--metrics=none",
    ],
    "summary.json": lambda model, data, out: [
        "evaluate", f"--data_path={data}", f"--model_name_or_path={model}", f"--output_dir={out}", "--max_samples=2",
        "--dataloader_num_workers=0", "--metrics=none",
    ],
    "job.sh": lambda model, data, out: [
        "slurm", str(recipe(out, model, data)), "--gpus_per_node=1", f"--output={out / 'job.sh'}", "--overwrite"
    ],
}  # fmt: skip


def recipe(folder: Path, model: Path, data: Path) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(json.dumps({"model_name_or_path": str(model), "data_path": str(data), "output_dir": "run"}))
    return path


@pytest.mark.parametrize("name", WRITTEN)
def test_another_file_of_that_name_is_refused_before_any_work_and_ours_replaced(
    name: str, tiny_llava: Path, shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "images").symlink_to(shapes / "train" / "images")
    rows = json.loads((shapes / "train" / "chat.json").read_text())[:3]
    rows[1]["conversations"][1]["value"] = ""  # so that a list of faults has a line
    has_fault = name in ("list.jsonl", "findings.jsonl")
    (data / "chat.json").write_text(json.dumps(rows if has_fault else rows[::2]))
    out = tmp_path / "out"
    out.mkdir()
    arguments = WRITTEN[name](tiny_llava, data, out)
    (out / name).write_text(PRECIOUS)
    before = sorted(path.name for path in out.iterdir())
    assert main(arguments) == 2
    assert f"{out / name}: is there already, and llavaforge did not write it" in capsys.readouterr().err
    assert (out / name).read_text() == PRECIOUS and sorted(path.name for path in out.iterdir()) == before
    (out / name).unlink()
    for _ in range(2):  # written, and then replaced
        assert main(arguments) == (2 if has_fault else 0)
        assert (out / name).read_text() not in ("", PRECIOUS)
    (out / name).unlink()
    (out / name).mkdir()
    assert main(arguments) == 2
    told = capsys.readouterr().err
    assert "is a folder. Name a file" in told or "not a file's name" in told


KILLED = """
import os, signal, sys
from pathlib import Path
from llavaforge import files
name = sys.argv[2]
real = getattr(os, name)
def die(*arguments, **options):
    os.kill(os.getpid(), signal.SIGKILL)
setattr(os, name, die)
files.replace_text(Path(sys.argv[1]), "new" * 100_000)
"""


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_kill_while_a_file_is_replaced_leaves_the_old_one(moment: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("old")
    assert subprocess.run([sys.executable, "-c", KILLED, str(path), moment]).returncode == -9
    assert path.read_text() == "old"


def test_a_linked_file_stays_a_link_and_what_is_no_file_is_written_to(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there" / "file")
    replace_text(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "there" / "file").read_text() == "text"
    replace_text(Path("/dev/null"), "text")
    assert not Path("/dev/null").is_file()


def test_a_full_disk_is_told_by_name_and_leaves_the_old_file(tmp_path: Path) -> None:
    code = """
import resource, sys
from pathlib import Path
from llavaforge.errors import as_user_error
from llavaforge.files import replace_text
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # what is written past it fails as on a full disk
try:
    replace_text(Path(sys.argv[1]), "x" * 100_000)
except OSError as error:
    print(as_user_error(error))
"""
    path = tmp_path / "file"
    path.write_text("old")
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert done.stdout.startswith(f"{path}: File too large.") and path.read_text() == "old"
    assert [one.name for one in tmp_path.iterdir()] == ["file"]


def test_lists_of_ours_are_valid_json_whatever_is_written_and_cut(tmp_path: Path) -> None:
    path = tmp_path / "list.jsonl"
    assert read_json_lines(path) == []
    append_line(path, {"loss": float("nan"), "deep": [float("inf"), {"x": (1.0, -float("inf"))}]})
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == {
        "loss": None,
        "deep": [None, {"x": [1.0, None]}],
    }
    with path.open("ab") as file:
        file.write(b'{"half": \n\n[1]\n\xff\xfe\n{"whole": 1}\n')
    assert read_json_lines(path)[1:] == [{"whole": 1}]
    assert to_json({"a": 1.5}) == '{"a": 1.5}'


def test_what_is_set_aside_takes_a_free_name(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / "final").mkdir()
        (tmp_path / "final" / "n").write_text(str(number))
        set_aside(tmp_path / "final")
    names = ("final.corrupt", "final.corrupt-2", "final.corrupt-3")
    assert [(tmp_path / name / "n").read_text() for name in names] == ["0", "1", "2"]


def test_of_a_bad_place_the_user_is_told_and_no_other_error_is_called_theirs(
    tiny_llava: Path, shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("x")
    train = ["train", f"--model_name_or_path={tiny_llava}", f"--data_path={shapes / 'train'}", "--max_steps=1"]
    train += ["--dataloader_num_workers=0"]
    nowhere = "/proc/llavaforge"  # no folder can be made there, by nobody
    for arguments, named in (
        ([*train, f"--output_dir={tmp_path / 'file' / 'run'}"], tmp_path / "file"),
        ([*train, f"--output_dir={nowhere}/run"], nowhere),
        ([*train, f"--output_dir={tmp_path / 'run'}", f"--cache_dir={nowhere}/cache"], nowhere),
        (["data", "check", f"--data_path={shapes / 'train'}", f"--report={nowhere}/report"], nowhere),
        (["customize-model", f"--vision_tower={tiny_llava}", f"--language_model={tiny_llava}",
          f"--output_dir={nowhere}/model"], nowhere),
        (["data", "make-shapes", f"--output_dir={nowhere}/shapes", "--num_samples=2"], nowhere),
    ):  # fmt: skip
        assert main(arguments) == 2, arguments
        told = capsys.readouterr().err
        assert str(named) in told and "Traceback" not in told
    assert not os.path.exists(tmp_path / "run" / "final")

    def breaks(*_: object) -> None:
        raise OSError(2, "No such file or directory", str(Path(__file__).parent.parent / "src" / "llavaforge" / "x.py"))

    monkeypatch.setattr("llavaforge.starter.shapes.make_shapes", breaks)
    import llavaforge

    monkeypatch.setattr("llavaforge.errors.__file__", str(Path(llavaforge.__file__).parent / "errors.py"))
    assert main(["data", "make-shapes", f"--output_dir={tmp_path / 's'}", "--num_samples=2"]) == 1
    assert "a fault in llavaforge" in capsys.readouterr().err


def test_control_characters_of_other_peoples_texts_do_not_reach_the_terminal(
    tiny_llava: Path, shapes: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    escape = "a \x1b]0;owned\x07\x1b[2J red \u202e"
    rows = json.loads((shapes / "train" / "chat.json").read_text())[:4]
    for row in rows:
        row["conversations"][1]["value"] = escape
        row["id"] = escape
    rows.append({"id": escape, "image": escape, **{key: rows[0][key] for key in ("conversations",)}})
    data = tmp_path / "data"
    data.mkdir()
    (data / "images").symlink_to(shapes / "train" / "images")
    (data / "chat.json").write_text(json.dumps(rows))
    (tmp_path / escape.replace("/", "")).write_text("- no recipe")
    common = [f"--data_path={data}", f"--model_name_or_path={tiny_llava}"]
    for arguments in (
        ["train", *common, f"--output_dir={tmp_path / 'run'}", "--max_steps=1", "--dataloader_num_workers=0"],
        ["train", *common, f"--output_dir={tmp_path / 'run'}", "--max_steps=1", "--dataloader_num_workers=0",
         "--on_bad_sample=skip"],
        ["data", "check", *common],
        ["data", "preview", *common],
        ["train", str(tmp_path / escape)],
        ["train", f"--model_name_or_path={escape}", f"--data_path={data}", f"--output_dir={tmp_path / 'run'}"],
    ):  # fmt: skip
        main(arguments)
        out, err = capfd.readouterr()
        for text in (out, err):
            assert "\x1b" not in text and "\x07" not in text and "\u202e" not in text, arguments


def test_a_place_below_a_file_is_refused_before_any_work(
    tiny_llava: Path, shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text(PRECIOUS)
    for name in ("samples.jsonl", "report.html", "page.html", "list.jsonl"):
        assert main(WRITTEN[name](tiny_llava, shapes / "train", tmp_path / "file" / "below")) == 2
        told = capsys.readouterr().err
        assert "file: is a file, and " in told and "metrics of answers" not in told
    assert (tmp_path / "file").read_text() == PRECIOUS


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="where nothing can be written, not even by root")
def test_a_place_that_cannot_be_written_is_named_as_the_user_named_it() -> None:
    """(Not by the temporary name under which it would have been written.)"""
    with pytest.raises(OSError, match=r"'/proc/here.txt'$"):
        replace_text(Path("/proc/here.txt"), "x")
    with pytest.raises(OSError, match=r"'/proc/here'$"), publishing(Path("/proc/here")):
        pass
