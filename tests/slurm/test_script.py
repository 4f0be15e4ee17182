"""The sbatch script: one template, options in their places, nonsense refused, paths quoted. See also tests/slurm."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from llavaforge.cli import main
from llavaforge.config.schema import SlurmConfig
from llavaforge.sbatch import script

RUN_SH = Path(__file__).parent.parent.parent / "run.sh"


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A recipe of two stages in the current folder."""
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(
        "model_name_or_path: m\ndata_path: d\noutput_dir: o\nglobal_batch_size: 64\nstages:\n"
        "  - {name: one, train_type: projector}\n  - {name: two, global_batch_size: 48}\n"
    )
    return "mine.yaml"


def directives(text: str) -> dict[str, str]:
    """The options of sbatch in a script."""
    return {option: value for option, _, value in re.findall(r"^#SBATCH --([\w-]+)(=?)(.*)$", text, flags=re.M)}


def run(text: str, folder: Path, *arguments: str, srun: str = "exit 0", **environment: str) -> tuple[int, str, bool]:
    """Run a script with stand-ins for SLURM's commands.

    Returns:
        Its exit code, what it said, and whether it asked to be queued again.
    """
    for name, lines in {"srun": srun, "scontrol": f'echo "$@" > {folder}/asked', "llavaforge": "exit 1"}.items():
        (folder / name).write_text(f"#!/bin/bash\n{lines}\n")
        (folder / name).chmod(0o755)
    path = os.pathsep.join([str(folder), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-c", text, "script", *arguments],
        env={"PATH": path, "SLURM_JOB_ID": "7", **environment},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    asked = (folder / "asked").read_text() if (folder / "asked").exists() else ""
    assert asked in ("", "requeue 7\n")
    return done.returncode, done.stdout + done.stderr, bool(asked)


def test_run_sh_is_what_the_verb_writes() -> None:
    assert RUN_SH.read_text() == script(SlurmConfig(recipe=Path("recipe.yaml")), "run.sh", None)
    assert os.access(RUN_SH, os.X_OK)
    assert subprocess.run(["bash", "-n", RUN_SH]).returncode == 0


def test_run_sh_names_no_private_path() -> None:
    assert set(re.findall(r"(?<![\w.}])/[\w/]+", RUN_SH.read_text())) == {"/usr/bin/env", "/dev/null"}


def test_options_become_directives(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--nodes 2 --gpus_per_node 8 --cpus-per-gpu 6 --time 2-12 --partition gpu,big --account lab --qos high "
    flags += "--constraint a100|h100 --mem 480G --job_name mine --output jobs/two.sh"
    assert main(["slurm", recipe, *flags.split()]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "output": "jobs/two.sh", "submit": "sbatch jobs/two.sh", "processes": 16,
    }  # fmt: skip
    text = Path("jobs/two.sh").read_text()
    assert directives(text) == {
        "job-name": "mine", "output": "%x-%j.log", "open-mode": "append", "nodes": "2", "ntasks-per-node": "8",
        "gres": "gpu:8", "cpus-per-task": "6", "time": "2-12", "partition": "gpu,big", "account": "lab", "qos": "high",
        "constraint": "a100|h100", "mem": "480G", "requeue": "", "signal": "USR1@120",
    }  # fmt: skip
    assert os.access("jobs/two.sh", os.X_OK)


def test_only_what_is_asked_becomes_a_directive() -> None:
    asked = directives(RUN_SH.read_text())
    assert {"nodes": "1", "ntasks-per-node": "4", "gres": "gpu:4"}.items() <= asked.items()
    assert not {"time", "partition", "account", "qos", "constraint", "mem"} & asked.keys()


def test_an_existing_script_is_replaced_only_when_that_is_asked(
    recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["slurm", recipe]) == 0
    before = Path("mine.sh").read_text()
    assert main(["slurm", recipe, "--gpus_per_node", "2"]) == 2
    assert "mine.sh: is there already. Give another --output, or --overwrite" in capsys.readouterr().err
    assert Path("mine.sh").read_text() == before
    assert main(["slurm", recipe, "--gpus_per_node", "2", "--overwrite"]) == 0
    assert "gpu:2" in Path("mine.sh").read_text()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--nodes", "0"], "`nodes` = '0': Input should be greater than 0"),
        (["--gpus_per_node", "-1"], "`gpus_per_node` = '-1'"),
        (["--nodes", "3"], "mine.yaml: stages[0] (one): global_batch_size 64 does not divide over 3 x 4 = 12 GPUs"),
        (["--gpus_per_node", "32"], "stages[1] (two): global_batch_size 48 does not divide over 1 x 32 = 32 GPUs"),
        (["--nodes", "16"], "global_batch_size 48 does not divide over 16 x 4 = 64 GPUs. Set it to 64, or take"),
        (["--time", "24h"], "`time` = '24h': give HH:MM:SS, D-HH"),
        (["--time", "24:75:00"], "`time` = '24:75:00'"),
        (["--time", "1-00:00:00:00"], "`time` = '1-00:00:00:00'"),
        (["--time", "4:30"], "`time` = '4:30' is less than 5 minutes"),
        (["--time", "0"], "A bare number is minutes"),
        (["--partition", "a b"], "`partition` = 'a b': give a name without spaces"),
        (["--job_name", "x\n#SBATCH --nodes=9"], "`job_name` = "),
        (["--account", "a#b"], "`account` = 'a#b'"),
        (["--mem", "480 G"], "`mem` = '480 G': give the memory of a node such as 480G"),
        (["--deepspeed", "$(id)"], "deepspeed"),
        (["--partiton", "gpu"], "unknown argument `--partiton`. Did you mean `--partition`?"),
        (["--output", "."], "'.': not a file's name"),
        (["--output", "a\nb"], "not a file's name"),
    ],
)  # fmt: skip
def test_nonsense_is_refused(flags: list[str], expected: str, recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["slurm", recipe, *flags]) == 2
    captured = capsys.readouterr()
    assert expected in captured.err and "Traceback" not in captured.err and captured.out == ""
    assert os.listdir() == ["mine.yaml"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("data_path: d\noutput_dir: o\n", "mine.yaml: `model_name_or_path` is missing"),
        ("model_name_or_path: m\ndata_path: d\noutput_dir: o\nlearning_rat: 1\n", "Did you mean `learning_rate`?"),
        ("stages: 3\n", "`stages` is a list of mappings"),
        ("- a\n", "a recipe is a mapping"),
    ],
)
def test_a_faulty_recipe_is_refused(text: str, expected: str, recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path(recipe).write_text(text)
    assert main(["slurm", recipe]) == 2
    assert expected in capsys.readouterr().err
    assert main(["slurm", "nowhere.yaml"]) == 2
    assert "nowhere.yaml: no such recipe" in capsys.readouterr().err
    assert main(["slurm"]) == 2


@pytest.mark.parametrize("time", ["5", "90:00", "24:00:00", "100:00:00", "2-0", "2-12:30", "2-12:30:15"])
def test_slurms_ways_to_write_a_time(time: str, recipe: str) -> None:
    assert main(["slurm", recipe, "--time", time]) == 0
    assert f"#SBATCH --time={time}\n" in Path("mine.sh").read_text()


def test_a_recipes_path_is_quoted(tmp_path: Path) -> None:
    name = 'it\'s $(touch oops) "a" `b` \\ recipe.yaml'
    config = SlurmConfig(recipe=Path(name), deepspeed="zero3")
    text = script(config, name, config.recipe)
    code, said, _ = run(text, tmp_path, "--lora_r", "8", srun='printf "<%s>\\n" "${@:6}"')
    words = ["train", "--deepspeed", "zero3", name, "--lora_r", "8"]
    assert (code, said.splitlines()) == (0, [f"<{word}>" for word in words])
    assert run(text, tmp_path, srun='echo "$*"', DEEPSPEED="zero1")[1].count("--deepspeed zero1") == 1
    assert not (tmp_path / "oops").exists()


@pytest.mark.parametrize(
    ("code", "environment", "queued_again"),
    [
        (0, {}, False),
        (75, {}, True),
        (75, {"SLURM_RESTART_COUNT": "19"}, True),
        (75, {"SLURM_RESTART_COUNT": "20"}, False),
        (75, {"SLURM_RESTART_COUNT": "20", "MAX_REQUEUES": "21"}, True),
        (1, {}, False),
        (2, {}, False),
        (130, {}, False),
        (137, {}, False),
        (143, {}, False),
    ],
)
def test_which_ends_are_queued_again(
    code: int, environment: dict[str, str], queued_again: bool, tmp_path: Path
) -> None:
    assert run(RUN_SH.read_text(), tmp_path, srun=f"exit {code}", **environment)[::2] == (code, queued_again)


def test_a_start_that_lasted_may_be_followed_by_another(tmp_path: Path) -> None:
    text = RUN_SH.read_text().replace("set -uo pipefail", "set -uo pipefail; SECONDS=600")
    assert run(text, tmp_path, srun="exit 75", SLURM_RESTART_COUNT="99")[2]


def test_ended_by_slurm_it_waits_for_the_tasks_and_is_not_queued_again(tmp_path: Path) -> None:
    code, said, queued_again = run(RUN_SH.read_text(), tmp_path, srun="kill $PPID; sleep 0.5; echo all saved; exit 75")
    assert (code, queued_again) == (75, False)
    assert said.startswith("all saved\n") and "SLURM's to say" in said


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    text = RUN_SH.read_text()
    code, said, _ = run(text, tmp_path, LLAVAFORGE="elsewhere")
    assert code == 2 and "no program elsewhere: set VENV or LLAVAFORGE" in said
    code, said, _ = run(text, tmp_path, VENV="nowhere")
    assert code == 2 and "nowhere/bin/activate" in said
    code, said, _ = run(text, tmp_path, SLURM_JOB_ID="")
    assert code != 0 and "submit this script with sbatch" in said


def test_the_verb_starts_light(recipe: str) -> None:
    code = (
        "import sys; from llavaforge.cli import main; code = main(sys.argv[1:]); "
        "sys.exit(code or any(name in sys.modules for name in ('torch', 'transformers', 'pyarrow')))"
    )
    for arguments in ([recipe], ["--help"]):
        assert subprocess.run([sys.executable, "-c", code, "slurm", *arguments], capture_output=True).returncode == 0
