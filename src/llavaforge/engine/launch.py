"""Which engine a process gets, from the environment that torchrun or srun left.

torchrun sets WORLD_SIZE, RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT; srun sets SLURM_NTASKS, SLURM_PROCID,
SLURM_LOCALID.
"""

import os
from pathlib import Path

from llavaforge.engine.base import Engine
from llavaforge.engine.plain import PlainEngine


def open_engine(deepspeed_config: Path | None) -> Engine:
    """Return the engine of this process: plain when it is alone, DeepSpeed otherwise."""
    _adopt_srun()
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return PlainEngine()
    from llavaforge.engine.zero import ZeroEngine

    return ZeroEngine(deepspeed_config)


def _adopt_srun() -> None:
    """Give srun's ranks the names that torch.distributed knows.

    Only inside a job step with several tasks: an interactive allocation also sets SLURM_NTASKS.
    """
    if "WORLD_SIZE" in os.environ or "SLURM_STEP_ID" not in os.environ:
        return
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) == 1:
        return
    os.environ["WORLD_SIZE"] = os.environ["SLURM_STEP_NUM_TASKS"]
    os.environ["RANK"] = os.environ["SLURM_PROCID"]
    os.environ["LOCAL_RANK"] = os.environ["SLURM_LOCALID"]
    # One job has one port, and two jobs on a node must not share it.
    os.environ.setdefault("MASTER_PORT", str(20_000 + int(os.environ["SLURM_JOB_ID"]) % 20_000))
    os.environ.setdefault("MASTER_ADDR", _first_host(os.environ["SLURM_STEP_NODELIST"]))


def _first_host(nodelist: str) -> str:
    """Return the first host of a SLURM list: `a[03-05,9],b1` -> `a03`."""
    head, bracket, rest = nodelist.partition("[")
    if not bracket or "," in head:
        return nodelist.split(",")[0]
    return head + rest.split("]")[0].replace("-", ",").split(",")[0]
