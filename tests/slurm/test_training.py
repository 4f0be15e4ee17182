"""Real training in jobs of two nodes: to the end; through USR1, scancel and a dead node to the same weights."""

import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from cluster import Cluster, wait

from llavaforge.checkpoint.state import load_run
from llavaforge.config.schema import CustomizeModelConfig
from llavaforge.folders import differences
from llavaforge.join.parts import customize_model
from llavaforge.training.metrics import read_metrics
from train_tools import tensors_of

pytestmark = pytest.mark.slurm

RUN_SH = str(Path(__file__).parent.parent.parent / "run.sh")
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1", "--gres=none", "--cpus-per-task=1")
STEPS = 120
PER_PROCESS = 4


@pytest.fixture(scope="module")
def recipe(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Quickstart's parts, joined, in a recipe that saves only when it is asked to stop."""
    folder = tmp_path_factory.mktemp("recipe")
    parts = files("llavaforge") / "starter"
    model = CustomizeModelConfig(
        vision_tower=str(parts / "small-clip"), language_model=str(parts / "small-qwen2"), output_dir=folder / "model"
    )
    customize_model(model)
    values: dict[str, Any] = dict(
        model_name_or_path=str(folder / "model"), data_path=str(shapes / "train"), output_dir="run",
        train_type="freeze_vision", max_steps=STEPS, per_device_train_batch_size=PER_PROCESS,
        gradient_accumulation_steps=1, learning_rate=1e-3, bf16=False, dataloader_num_workers=0, save_steps=0,
    )  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The weights of a job that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    job = submit(cluster, recipe, folder)
    cluster.wait_for(job, "COMPLETED")
    assert differences(folder / "run" / "final") == []
    # No global_batch_size is given: it becomes what each process takes, times the processes that found each other.
    assert load_run(folder / "run" / "final")["identity"]["global_batch_size"] == 2 * PER_PROCESS
    return tensors_of(folder / "run" / "final")


def submit(cluster: Cluster, recipe: Path, folder: Path, *arguments: str) -> str:
    return cluster.submit(folder, *TWO_NODES, RUN_SH, str(recipe), *arguments, DEEPSPEED="zero2")


def wait_steps(cluster: Cluster, job: str, folder: Path, num_steps: int) -> None:
    """Wait until so many steps are done."""

    def condition() -> bool:
        assert cluster.field(job, "JobState") in ("PENDING", "RUNNING"), cluster.log(job)
        return len(read_metrics(folder / "run")) >= num_steps

    wait(condition, 900, lambda: cluster.log(job))


def saved_steps(folder: Path) -> list[int]:
    """The steps of the checkpoints of a run, all of them whole."""
    checkpoints = sorted((folder / "run").glob("checkpoint-*"))
    assert [fault for checkpoint in checkpoints for fault in differences(checkpoint)] == []
    return sorted(int(checkpoint.name.removeprefix("checkpoint-")) for checkpoint in checkpoints)


def went_on_from(cluster: Cluster, job: str) -> list[int]:
    """The steps from which a job went on, start by start."""
    return [int(step) for step in re.findall(r"going on from \S*checkpoint-(\d+)", cluster.log(job))]


def assert_went_on_to_the_same(
    cluster: Cluster, job: str, folder: Path, starts: Sequence[int], weights: dict[str, torch.Tensor]
) -> None:
    """The job began anew at the given steps, and its result is the undisturbed one, to the bit."""
    assert went_on_from(cluster, job) == list(starts)
    assert [line["step"] for line in read_metrics(folder / "run")] == list(range(1, STEPS + 1))
    final = folder / "run" / "final"
    assert differences(final) == []
    result = tensors_of(final)
    assert result.keys() == weights.keys()
    assert [name for name, tensor in weights.items() if not torch.equal(result[name], tensor)] == []


def test_a_job_of_two_nodes_trains_quickstarts_parts(undisturbed: dict[str, torch.Tensor]) -> None:
    assert undisturbed


def test_usr1_saves_and_the_job_goes_on_scancel_ends_it_and_the_next_one_survives_a_dead_node(
    cluster: Cluster, recipe: Path, undisturbed: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    cancelled = submit(cluster, recipe, tmp_path)
    wait_steps(cluster, cancelled, tmp_path, 10)
    cluster.run("scancel", "--signal=USR1", cancelled)  # to the tasks, as SLURM does before the time limit
    cluster.wait_requeued(cancelled)
    saved = saved_steps(tmp_path)
    assert len(saved) == 1 and 10 <= saved[0] < STEPS // 2

    cluster.release(cancelled)
    wait_steps(cluster, cancelled, tmp_path, saved[0] + 10)
    assert went_on_from(cluster, cancelled) == saved
    cluster.run("scancel", cancelled)
    cluster.wait_for(cancelled, "CANCELLED")
    assert cluster.field(cancelled, "Restarts") == "1"  # USR1's, and no other
    saved = saved_steps(tmp_path)
    assert len(saved) == 2 and saved[0] + 10 <= saved[1] < STEPS * 2 // 3

    job = submit(cluster, recipe, tmp_path, "--save_steps=10")
    wait_steps(cluster, job, tmp_path, saved[1] + 25)
    cluster.kill_node("n2")
    try:
        wait(lambda: cluster.node_states()[1] == "down*", 300, lambda: str(cluster.node_states()))
        cluster.wait_requeued(job)
    finally:
        cluster.start_node("n2")
    newest = saved_steps(tmp_path)[-1]
    assert newest >= saved[1] + 10
    wait(lambda: cluster.node_states() == ["idle", "idle"], 300, lambda: str(cluster.node_states()))
    cluster.release(job)
    cluster.wait_for(job, "COMPLETED")
    assert_went_on_to_the_same(cluster, job, tmp_path, [saved[1], newest], undisturbed)
