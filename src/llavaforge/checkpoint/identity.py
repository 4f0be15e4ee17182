"""What identifies a run: two starts with the same identity train the same model, to the bit on one machine.

Comes in: a run's options and what it reads. Goes out: plain JSON that stands in every `run.json`; and what differs
between two of them.
"""

import hashlib
import json
import logging
from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from llavaforge.config.load import nearest
from llavaforge.config.schema import TrainConfig, identifying
from llavaforge.data.index.index import SampleIndex
from llavaforge.data.order.mixture import Mixture, RowNumbers
from llavaforge.data.order.plan import Plan
from llavaforge.errors import UserError
from llavaforge.folders import fingerprint
from llavaforge.model.load import LoadedModel
from llavaforge.model.trainable import lora_options
from llavaforge.version import __version__

logger = logging.getLogger(__name__)


def describe_run(
    config: TrainConfig, loaded: LoadedModel, index: SampleIndex, mixture: Mixture, plan: Plan
) -> dict[str, Any]:
    """Return what stands in every `run.json`: what identifies the run, and what a reader of its folders needs.

    Args:
        config: the run's options; `config.schema.Changeable` marks those that do not identify it.
        loaded: the model it starts from.
        index: all its data.
        mixture: what of it an epoch holds.
        plan: its order, and the number of steps.
    """
    values, lora = config.model_dump(mode="json"), lora_options(config)
    projector = loaded.model.model.multi_modal_projector if config.projector_from else None
    identity = {name: values[name] for name in identifying()} | {
        "base_model": fingerprint(loaded.path),
        "projector": sum(float(p.double().sum()) for p in projector.parameters()) if projector is not None else None,
        "data": data_identity(index, mixture),
        "global_batch_size": plan.global_batch_size,
        "preprocessing": json.loads(json.dumps(asdict(loaded.preprocessing))),  # as it is read back: lists
    }
    return {
        "llavaforge": __version__,
        "train_type": config.train_type,
        "base_model": str(loaded.path.absolute()),
        "lora": asdict(lora) if lora is not None else None,
        "data": [entry.model_dump(mode="json", exclude_defaults=True) for entry in config.entries],
        "hub_data": [str(entry.path) for entry in config.entries if not entry.path.expanduser().exists()],
        "num_steps": plan.num_steps,
        "identity": identity,
        "config": values,
    }


def data_identity(index: SampleIndex, mixture: Mixture) -> list[Any]:
    """Return what tells the data of a run, and which of its rows are trained on, from those of others."""
    return [index.fingerprint, *mixture.draws, _checksum(mixture.rows)]


def check_same_run(folder: Path, theirs: dict[str, Any], ours: dict[str, Any], allowed: Collection[str] = ()) -> None:
    """Check that a folder belongs to this run; an option that an older run did not know had its default there.

    (What was not recorded then, besides options, is not compared.)

    Args:
        folder: for the message.
        theirs: the identity found there.
        ours: this run's.
        allowed: `allow_changes`: what may differ.

    Raises:
        UserError: names what differs, or what of `allowed` identifies no run.
    """
    if unknown := sorted(set(allowed) - ours.keys()):
        raise UserError(
            f"allow_changes: `{unknown[0]}` does not identify a run.{nearest(unknown[0], ours)} It is one of "
            f"{', '.join(sorted(ours))}; everything else may change between starts without being named."
        )
    before = {name: theirs.get(name, default) for name, default in identifying().items()} | theirs
    different = [name for name in sorted(ours) if name in before and before[name] != ours[name]]
    for name in set(different) & set(allowed):
        logger.warning("%s: %s changes from %r to %r (allow_changes)", folder, name, before[name], ours[name])
    if different := [name for name in different if name not in allowed]:
        lines = [f"  {name}: {before.get(name)!r} there, {ours[name]!r} now" for name in different]
        raise UserError(
            f"{folder}: belongs to another run, which differs in\n"
            + "\n".join(lines)
            + "\nGive another output_dir, or the same options; or take a change over by name: "
            f"--allow_changes {' '.join(different)}"
        )


def _checksum(rows: Sequence[RowNumbers]) -> str:
    """Identify which rows of the data take part (quarantine, held-out records)."""
    return hashlib.sha256(b"".join(np.ascontiguousarray(mine).tobytes() for mine in rows)).hexdigest()[:16]
