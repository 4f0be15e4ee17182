"""Rank, world size and address come from torchrun's or SLURM's variables."""

import pytest

from llavaforge.engine.zero import deal
from llavaforge.errors import UserError
from llavaforge.processes.launch import num_processes
from llavaforge.processes.world import _check_devices, share_of_cores

STEP = {
    "SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1", "SLURM_NTASKS": "8", "SLURM_STEP_NODELIST": "gpu[03-04,9],big1",
}  # fmt: skip


def test_srun_gives_rank_size_and_address() -> None:
    environment = dict(STEP)
    assert num_processes(environment) == 8
    assert (environment["RANK"], environment["LOCAL_RANK"], environment["MASTER_ADDR"]) == ("5", "1", "gpu03")
    assert 20_000 <= int(environment["MASTER_PORT"]) < 32_000
    other = STEP | {"SLURM_STEP_ID": "1"}
    num_processes(other)
    assert other["MASTER_PORT"] != environment["MASTER_PORT"], "two steps of a job share a host"


@pytest.mark.parametrize(
    ("nodelist", "first"),
    [("n1", "n1"), ("n1,n2", "n1"), ("n[1-2]", "n1"), ("rack-a[07,12-15]", "rack-a07"), ("a,b[1-2]", "a")],
)
def test_the_first_host_of_a_list(nodelist: str, first: str) -> None:
    environment = STEP | {"SLURM_STEP_NODELIST": nodelist}
    num_processes(environment)
    assert environment["MASTER_ADDR"] == first


def test_what_the_user_sets_stays_and_torchrun_comes_before_slurm() -> None:
    environment = STEP | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "5"}
    num_processes(environment)
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("10.0.0.1", "5")
    torchrun = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "h", "MASTER_PORT": "1"}
    assert num_processes(STEP | torchrun) == 2


def test_one_process_is_alone() -> None:
    assert num_processes({}) == 1
    assert num_processes({"SLURM_NTASKS": "4", "SLURM_JOB_ID": "1"}) == 1  # salloc, no step
    assert num_processes(STEP | {"SLURM_STEP_NUM_TASKS": "1"}) == 1
    with pytest.raises(UserError, match=r"MASTER_ADDR, MASTER_PORT not set\. Start several processes with torchrun"):
        num_processes({"WORLD_SIZE": "4", "RANK": "0", "LOCAL_RANK": "0"})


def test_two_processes_on_one_gpu_are_refused() -> None:
    hosts = [("a", "gpu-1"), ("a", "gpu-2"), ("b", "gpu-1"), ("a", "gpu-2")]
    for rank in (0, 1, 2):
        _check_devices(hosts, rank)
    with pytest.raises(UserError, match="processes 1 and 3 share one GPU of a"):
        _check_devices(hosts, 3)
    _check_devices([("a", ""), ("a", "")], 1)  # CPUs


def test_dealing_gives_everybody_about_the_same() -> None:
    sizes = {f"layer{number}": 1000 + 7 * number for number in range(50)} | {"embedding": 9000}
    totals = [0] * 4
    for name, owner in deal(sizes, 4):
        totals[owner] += sizes[name]
    assert max(totals) < 1.1 * min(totals)
    assert deal(sizes, 4) == deal(dict(reversed(sizes.items())), 4)  # all ranks must agree


def test_processes_that_may_run_on_the_same_cores_share_them() -> None:
    everything = {0, 1, 2, 3, 4, 5, 6, 7}
    torchrun = [(host, everything) for host in ("a", "a", "a", "b")]
    assert [share_of_cores(torchrun, rank) for rank in range(4)] == [2, 2, 2, 8]
    srun = [("a", {0, 1, 2, 3}), ("a", {4, 5, 6, 7}), ("b", {0, 1, 2, 3})]
    assert [share_of_cores(srun, rank) for rank in range(3)] == [4, 4, 4]
    assert share_of_cores([("a", {0})] * 3, 1) == 1
