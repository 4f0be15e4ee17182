"""What identifies a run: two starts with the same identity train the same model, to the bit on one machine.

Comes in: a run's options and what it reads. Goes out: plain JSON that stands in every `run.json`; and what differs
between two of them.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from llavaforge.config.schema import TrainConfig, identifying
from llavaforge.errors import UserError
from llavaforge.files import fingerprint


def identity(
    config: TrainConfig, base_model: Path, projector: nn.Module | None, data: Sequence[Any], global_batch_size: int
) -> dict[str, Any]:
    """Return what identifies a run.

    Args:
        config: its options; `config.schema.Changeable` marks those that are left out.
        base_model: folder of the model it starts from.
        projector: one that took the place of the base model's own, or None.
        data: identifies the samples of an epoch.
        global_batch_size: samples per step.
    """
    values = config.model_dump(mode="json")
    return {name: values[name] for name in identifying()} | {
        "base_model": fingerprint(base_model),
        "projector": sum(float(p.double().sum()) for p in projector.parameters()) if projector is not None else None,
        "data": list(data),
        "global_batch_size": global_batch_size,
    }


def check_same_run(folder: Path, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    """Check that a folder belongs to this run; an option that an older run did not know had its default there.

    Args:
        folder: for the message.
        theirs: the identity found there.
        ours: this run's.

    Raises:
        UserError: names what differs.
    """
    before = {name: theirs.get(name, default) for name, default in identifying().items()} | theirs
    different = [name for name in sorted(ours) if before.get(name) != ours[name]]
    if different:
        lines = [f"  {name}: {before.get(name)!r} there, {ours[name]!r} now" for name in different]
        raise UserError(
            f"{folder}: belongs to another run, which differs in\n"
            + "\n".join(lines)
            + "\nGive another output_dir, or the same options."
        )


def checksum_of_rows(rows: Sequence[npt.NDArray[np.int64]]) -> str:
    """Identify which rows of the data take part (quarantine, held-out records)."""
    return hashlib.sha256(b"".join(np.ascontiguousarray(mine).tobytes() for mine in rows)).hexdigest()[:16]
