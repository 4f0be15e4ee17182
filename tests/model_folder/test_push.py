"""What is uploaded is the exported folder, and a hub that refuses costs no export."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hub import Hub, Repository, serving

NAME = "someone/my-llava"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving(Hub()) as hub:
        yield hub


def run(hub: Hub, arguments: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """Start Python by itself: `huggingface_hub` reads its variables once."""
    values = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    # A home without a token of its own.
    values |= {**hub.environment, "HF_HOME": "/nonexistent", "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    return subprocess.run([sys.executable, *arguments], env=values, capture_output=True, text=True, timeout=120)


def attempt(
    hub: Hub, folder: Path, act: str, name: str = NAME, options: str = "", **environment: str
) -> tuple[int, str]:
    """Check or push; return the exit code that the error stands for, and its text."""
    code = (
        "import sys\nfrom pathlib import Path\nfrom llavaforge.errors import UserError\n"
        "from llavaforge.model_folder.push import Repository\n"
        f"try: Repository({name!r}, {options}).{act}\n"
        "except UserError as error: print(error, end=''); sys.exit(error.exit_code)\n"
    )
    done = run(hub, ["-c", code.replace("FOLDER", f"Path({str(folder)!r})")], **environment)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "my export"
    path.mkdir()
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(os.urandom(50_000))
    return path


def test_an_export_is_uploaded_whole(tiny_llava: Path, hub: Hub, tmp_path: Path) -> None:
    output_dir = tmp_path / "exported"
    arguments = ["-m", "llavaforge", "export", "--checkpoint", str(tiny_llava), "--output_dir", str(output_dir)]
    done = run(hub, [*arguments, "--push_to_hub", NAME, "--private"])
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["url"] == f"{hub.address}/{NAME}"
    repository = hub.repositories[NAME]
    assert repository.private and repository.num_commits == 1
    written = {path.name: path.read_bytes() for path in output_dir.iterdir()}
    assert repository.files == {".gitattributes": b"", **written}
    assert {"model.safetensors", "README.md", "manifest.json"} <= written.keys()
    assert written["model.safetensors"] in hub.large.values()  # both ways of upload were taken
    assert written["config.json"] not in hub.large.values()


def test_what_can_be_known_is_told_before_the_export(hub: Hub, folder: Path) -> None:
    hub.repositories["someone/full"] = Repository(False, {"README.md": b"", "old.safetensors": b""})
    for name, options, environment, words in (
        (NAME, "", {"HF_TOKEN": ""}, "no token of the hub is at hand. Run `hf auth login`"),
        (NAME, "", {"HF_TOKEN": "hf_wrong"}, "nothing was exported yet"),
        ("my-llava", "", {}, "lacks its owner. Give OWNER/NAME"),
        ("a/b/c", "", {}, "push_to_hub: Repo id must be in the form"),
        ("else/my-llava", "", {}, "the token is one of someone. Give OWNER/NAME"),
        ("someone/full", "", {}, "has files already (README.md, old.safetensors)"),
        ("someone/full", "private=True, overwrite=True", {}, "is there already, and public"),
    ):
        code, told = attempt(hub, folder, "check()", name, options, **environment)
        assert code == 2 and words in told, told
    hub.role = "read"
    code, told = attempt(hub, folder, "check()")
    assert code == 2 and "may only read" in told
    code, told = attempt(hub, folder, "check()", HF_ENDPOINT="http://127.0.0.1:9")
    assert code == 1 and "Without --push_to_hub the export needs no hub" in told
    assert not any("POST" in asked for asked in hub.asked)


@pytest.mark.parametrize(
    ("path", "status", "code", "words"),
    [
        ("/repos/create", 403, 2, "may not write there"),
        ("/repos/create", 404, 2, "no such owner"),
        ("/preupload/", 401, 2, "does not take the token"),
        ("/commit/", 400, 1, "try again later"),
        ("/objects/batch", 403, 2, "may not write there"),
        ("/large/", 403, 2, "may not write there"),
    ],
)
def test_a_refused_upload_leaves_the_export_and_says_how_to_go_on(
    path: str, status: int, code: int, words: str, hub: Hub, folder: Path
) -> None:
    hub.refuses[path] = status
    found, told = attempt(hub, folder, "push(FOLDER)", options="private=True")
    assert found == code and words in told, told
    assert "the export is finished and verified, but not uploaded" in told
    assert told.endswith(f"Upload it later: hf upload {NAME} '{folder}' . --private")


def test_a_hub_that_is_gone_by_then_is_told(hub: Hub, folder: Path) -> None:
    found, told = attempt(hub, folder, "push(FOLDER)", HF_ENDPOINT="http://127.0.0.1:9")
    assert found == 1 and told.endswith(f"Upload it later: hf upload {NAME} '{folder}' .")


def test_an_older_model_s_shards_do_not_stay_beside_the_new_one(hub: Hub, folder: Path) -> None:
    hub.repositories[NAME] = Repository(True, {"model-00001-of-00002.safetensors": b"", "picture.png": b"mine"})
    assert attempt(hub, folder, "push(FOLDER)", options="overwrite=True") == (0, "")
    written = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert hub.repositories[NAME].files == {"picture.png": b"mine", **written}
