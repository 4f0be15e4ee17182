"""What `run.sh` makes of its tasks' ends, seen with a program that ends as it is told instead of training."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from cluster import KILL_WAIT_S, Cluster, wait

from llavaforge.config.schema import SlurmConfig
from llavaforge.sbatch import slurm

pytestmark = pytest.mark.slurm

RUN_SH = str(Path(__file__).parent.parent.parent / "run.sh")
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1", "--gres=none", "--cpus-per-task=1")
# Ends as `--ends CODE:SECONDS CODE:SECONDS ...` says, one entry per rank: at once, or so many seconds after a signal.
# After a restart all is done.
PROGRAM = """\
#!{python}
import json, os, signal, sys, time
rank, restarts = int(os.environ["SLURM_PROCID"]), os.environ.get("SLURM_RESTART_COUNT", "0")
signals = []
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: signals.append(number))

def tell(**values):
    with open(f"rank-{{rank}}.jsonl", "a") as file:
        file.write(json.dumps({{"restarts": restarts, **values}}) + "\\n")

names = ("SLURM_STEP_NUM_TASKS", "SLURM_CPUS_PER_TASK", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")
tell(arguments=sys.argv[1:], environment={{name: os.environ.get(name) for name in names}})
if restarts != "0" and "--always" not in sys.argv:
    sys.exit(0)
ends = sys.argv[sys.argv.index("--ends") + 1 :]
code, _, seconds = ends[rank % len(ends)].partition(":")
while seconds and not signals:
    time.sleep(0.05)
time.sleep(float(seconds or 0))
tell(saved=sorted(set(signals)))
sys.exit(int(code))
"""


@pytest.fixture
def program(tmp_path: Path) -> str:
    path = tmp_path / "program"
    path.write_text(PROGRAM.format(python=sys.executable))
    path.chmod(0o755)
    return str(path)


def told(folder: Path, rank: int) -> list[dict[str, Any]]:
    """What the program told as this rank."""
    path = folder / f"rank-{rank}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_started(folder: Path, num_ranks: int = 2) -> None:
    wait(lambda: all(told(folder, rank) for rank in range(num_ranks)), 300, lambda: str(os.listdir(folder)))


def finish(cluster: Cluster, job: str, folder: Path) -> None:
    """Let a requeued job go on, and see that it does so in the same log."""
    cluster.release(job)
    cluster.wait_for(job, "COMPLETED")
    assert [line["restarts"] for line in told(folder, 0)] == ["0", "0", "1"]
    assert "SLURM is asked to queue this job again" in cluster.log(job)


def test_as_it_stands_it_takes_four_gpus_of_one_node(cluster: Cluster, program: str, tmp_path: Path) -> None:
    arguments = ["a recipe.yaml", "--output_dir", "b c", "--ends", "0"]
    job = cluster.submit(tmp_path, RUN_SH, *arguments, LLAVAFORGE=program, OMP_NUM_THREADS="")
    cluster.wait_for(job, "COMPLETED")
    assert (tmp_path / f"llavaforge-{job}.log").exists()
    environment = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_CPUS_PER_TASK": "12", "OMP_NUM_THREADS": "12"}
    for rank in range(4):
        first = told(tmp_path, rank)[0]
        assert first["arguments"] == ["train", *arguments]
        assert first["environment"] == {**environment, "CUDA_VISIBLE_DEVICES": "0,1,2,3"}


def test_the_script_of_a_recipe(
    cluster: Cluster, program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = Path("it's a recipe.yaml")
    recipe.write_text("model_name_or_path: m\ndata_path: d\noutput_dir: o\nglobal_batch_size: 8\n")
    options = {"nodes": 2, "gpus_per_node": 2, "cpus_per_gpu": 3, "time": "1:00:00", "job_name": "mine", "mem": "500M"}
    result = slurm(SlurmConfig.model_validate({"recipe": recipe, **options}))
    job = cluster.submit(tmp_path, result["output"], "--ends", "0", LLAVAFORGE=program, DEEPSPEED="zero3")
    cluster.wait_for(job, "COMPLETED")
    assert cluster.field(job, "TimeLimit") == "01:00:00"
    assert (tmp_path / f"mine-{job}.log").exists()
    for rank in range(4):
        first = told(tmp_path, rank)[0]
        assert first["arguments"] == ["train", "--deepspeed", "zero3", str(recipe), "--ends", "0"]
        assert first["environment"]["SLURM_CPUS_PER_TASK"] == "3"
        assert first["environment"]["CUDA_VISIBLE_DEVICES"] == "0,1"


def test_before_the_time_limit_it_saves_and_is_queued_again(cluster: Cluster, program: str, tmp_path: Path) -> None:
    # The cluster's KillOnBadExit=1 would kill the second rank while it saves.
    arguments = ["r.yaml", "--ends", "75:0", "75:3"]
    job = cluster.submit(tmp_path, *TWO_NODES, "--time=2", RUN_SH, *arguments, LLAVAFORGE=program)
    cluster.wait_requeued(job)  # SLURM looks at limits every 30 s
    assert [told(tmp_path, rank)[1]["saved"] for rank in (0, 1)] == [[10], [10]]
    finish(cluster, job, tmp_path)


@pytest.mark.parametrize(("ends", "code"), [(["1", "75"], 75), (["2"], 2), (["1", "137"], 137), (["130"], 130)])
def test_only_a_saved_run_is_queued_again(
    ends: list[str], code: int, cluster: Cluster, program: str, tmp_path: Path
) -> None:
    arguments = ["r.yaml", "--ends", *ends]
    job = cluster.submit(tmp_path, *TWO_NODES, RUN_SH, *arguments, LLAVAFORGE=program, MAX_REQUEUES="0")
    cluster.wait_for(job, "FAILED")
    assert (cluster.field(job, "ExitCode"), cluster.field(job, "Restarts")) == (f"{code}:0", "0")
    # Not even that one goes round for ever, if it never lasts.
    assert ("not queued again: that was done MAX_REQUEUES times" in cluster.log(job)) == (code == 75)


def test_a_job_that_may_not_be_requeued_says_so(cluster: Cluster, program: str, tmp_path: Path) -> None:
    arguments = ["r.yaml", "--ends", "75"]
    job = cluster.submit(tmp_path, *TWO_NODES, "--no-requeue", RUN_SH, *arguments, LLAVAFORGE=program)
    cluster.wait_for(job, "FAILED")
    assert "submit it once more" in cluster.log(job)


def test_scancel_waits_for_the_tasks_to_save_and_is_the_end(cluster: Cluster, program: str, tmp_path: Path) -> None:
    arguments = ["r.yaml", "--ends", "75:1", f"75:{KILL_WAIT_S // 4}"]
    job = cluster.submit(tmp_path, *TWO_NODES, RUN_SH, *arguments, LLAVAFORGE=program)
    wait_started(tmp_path)
    cluster.run("scancel", job)
    cluster.wait_for(job, "CANCELLED")
    assert [told(tmp_path, rank)[1]["saved"] for rank in (0, 1)] == [[15], [15]]
    assert cluster.field(job, "Restarts") == "0"
    assert "whether it is queued again is SLURM's to say" in cluster.log(job)


@pytest.mark.parametrize("partition", ["grace", "low"])
def test_preempted_it_saves_and_is_queued_again(partition: str, cluster: Cluster, program: str, tmp_path: Path) -> None:
    arguments = ["r.yaml", "--ends", "75:1", "75:3"]
    options = ("--exclusive", f"--partition={partition}")
    job = cluster.submit(tmp_path, *TWO_NODES, *options, RUN_SH, *arguments, LLAVAFORGE=program)
    wait_started(tmp_path)
    other = cluster.submit(tmp_path, "--nodes=2", "--exclusive", "--wrap=true")
    cluster.wait_for(other, "COMPLETED")
    cluster.wait_requeued(job)
    assert [told(tmp_path, rank)[1]["saved"] for rank in (0, 1)] == [[15], [15]]
    cluster.release(job)
    cluster.wait_for(job, "COMPLETED")
