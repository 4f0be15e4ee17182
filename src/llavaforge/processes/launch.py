"""Where a process stands among those of its run, from the environment that torchrun or srun left.

torchrun sets WORLD_SIZE, RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT; srun sets SLURM_STEP_NUM_TASKS, SLURM_PROCID,
SLURM_LOCALID, SLURM_STEP_NODELIST.
"""

import os
from collections.abc import MutableMapping

from llavaforge.errors import UserError

_TORCHRUN = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def num_processes(environment: MutableMapping[str, str] = os.environ) -> int:
    """Return the number of processes of the run; srun's variables are given torchrun's names.

    Raises:
        UserError: WORLD_SIZE is set without the others that torchrun sets beside it.
    """
    _adopt_srun(environment)
    size = int(environment.get("WORLD_SIZE", "1"))
    missing = [name for name in _TORCHRUN if name not in environment]
    if size > 1 and missing:
        raise UserError(
            f"WORLD_SIZE is {size} but {', '.join(missing)} not set. Start several processes with torchrun or srun."
        )
    return size


def _adopt_srun(environment: MutableMapping[str, str]) -> None:
    """Give srun's ranks the names that torch.distributed knows.

    Only inside a job step with several tasks: an interactive allocation also sets SLURM_NTASKS.
    """
    if "WORLD_SIZE" in environment or "SLURM_STEP_ID" not in environment:
        return
    if int(environment.get("SLURM_STEP_NUM_TASKS", "1")) == 1:
        return
    environment["WORLD_SIZE"] = environment["SLURM_STEP_NUM_TASKS"]
    environment["RANK"] = environment["SLURM_PROCID"]
    environment["LOCAL_RANK"] = environment["SLURM_LOCALID"]
    # Two jobs on a node must not share a port, nor two steps of a job, nor a step and what is left of the one before.
    job, step = int(environment["SLURM_JOB_ID"]), int(environment["SLURM_STEP_ID"])
    environment.setdefault("MASTER_PORT", str(20_000 + (job * 7 + step) % 12_000))  # below the ephemeral ports
    environment.setdefault("MASTER_ADDR", _first_host(environment["SLURM_STEP_NODELIST"]))


def _first_host(nodelist: str) -> str:
    """Return the first host of a SLURM list: `a[03-05,9],b1` -> `a03`."""
    head, bracket, rest = nodelist.partition("[")
    if not bracket or "," in head:
        return nodelist.split(",")[0]
    return head + rest.split("]")[0].replace("-", ",").split(",")[0]
