"""What trackio keeps of a run is what the run's files say, read back by trackio's own command line.

Trackio takes no Pillow from 13 on: `make test-demo` has an environment for it.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from llavaforge.training.metrics import read_metrics
from train_tools import command, train_config

LISTENER = """
import os, sys

def told(event, arguments=()):
    if event in ("listening", "socket.connect", "socket.getaddrinfo", "socket.sendto"):
        with open(os.environ["CALLS"], "a") as file:
            file.write(f"{event} {arguments}\\n")

told("listening")
sys.addaudithook(told)
"""


@dataclass
class Tracked:
    """A run that was started twice: three steps, and three more."""

    output_dir: Path
    folder: Path
    printed: list[str]

    def query(self, sql: str) -> list[dict[str, Any]]:
        asked = [sys.executable, "-m", "trackio.cli", "query", "project", "--project", "llavaforge", "--json"]
        environment = {**os.environ, "TRACKIO_DIR": str(self.folder / "trackio")}
        done = subprocess.run([*asked, "--sql", sql], env=environment, stdout=subprocess.PIPE, check=True)
        rows: list[dict[str, Any]] = json.loads(done.stdout)["rows"]
        return rows


@pytest.fixture(scope="module")
def tracked(tiny_llava: Path, shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Tracked:
    pytest.importorskip("trackio", reason="needs trackio: make test-demo")
    folder = tmp_path_factory.mktemp("tracked")
    (folder / "home").mkdir()
    (folder / "sitecustomize.py").write_text(LISTENER)
    of_user = ("HF_", "TRACKIO_", "XDG_")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(of_user)}
    places = {"HOME": "home", "TRACKIO_DIR": "trackio", "MPLCONFIGDIR": "matplotlib", "CALLS": "calls"}
    environment |= {name: str(folder / place) for name, place in places.items()}
    environment["PYTHONPATH"] = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    questions = {place: shapes / place / "questions.json" for place in ("train", "heldout")}
    values = dict(eval_data_path=questions["heldout"], eval_steps=2, save_steps=3)
    printed = []
    for max_steps in (3, 6):
        config = train_config(tiny_llava, questions["train"], folder / "my-run", max_steps=max_steps, **values)
        started = [*command(config), "--report_to", "trackio"]
        done = subprocess.run(started, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        printed.append(done.stdout)
    return Tracked(folder / "my-run", folder, printed)


def test_trackio_gets_every_number_of_every_start(tracked: Tracked) -> None:
    rows = tracked.query("SELECT run_id, run_name, step, metrics FROM metrics ORDER BY id")
    lines = read_metrics(tracked.output_dir)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6] and sum("eval_loss" in line for line in lines) == 4
    numbers = [{key: value for key, value in line.items() if isinstance(value, int | float)} for line in lines]
    assert [{"step": row["step"], **json.loads(row["metrics"])} for row in rows] == numbers
    assert {row["run_name"] for row in rows} == {"my-run"}
    starts = [row["run_id"] for row in rows]
    assert starts == [starts[0]] * 3 + [starts[3]] * 3 and starts[0] != starts[3]


def test_trackio_shows_the_recipe_and_which_starts_belong_together(tracked: Tracked) -> None:
    recipes = [json.loads(row["config"]) for row in tracked.query("SELECT config FROM configs ORDER BY id")]
    assert [recipe["max_steps"] for recipe in recipes] == [3, 6]
    written = json.loads((tracked.output_dir / "run.json").read_text())["config"]
    assert {key: value for key, value in recipes[1].items() if not key.startswith("_")} == written
    assert [recipe["_Group"] for recipe in recipes] == ["my-run", "my-run"]


def test_nothing_leaves_the_machine_or_goes_elsewhere(tracked: Tracked) -> None:
    assert set((tracked.folder / "calls").read_text().splitlines()) == {"listening ()"}
    assert {path.name for path in (tracked.folder / "trackio").iterdir()} == {"llavaforge.db", "llavaforge.lock"}
    assert [str(path) for path in (tracked.folder / "home").rglob("*") if path.is_file()] == []


def test_what_trackio_says_is_no_result(tracked: Tracked) -> None:
    for printed in tracked.printed:
        assert "rackio" not in printed and json.loads(printed.splitlines()[-1])["tokens_per_s"] > 0
