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
from llavaforge.data.order.mixture import RowNumbers
from llavaforge.data.order.plan import Plan
from llavaforge.data.order.run_data import OpenedData
from llavaforge.errors import UserError
from llavaforge.folders import fingerprint
from llavaforge.model.load import LoadedModel
from llavaforge.model.trainable import lora_options
from llavaforge.version import __version__

logger = logging.getLogger(__name__)


def describe_run(config: TrainConfig, loaded: LoadedModel, data: OpenedData, plan: Plan) -> dict[str, Any]:
    """Return what stands in every `run.json`: what identifies the run, and what a reader of its folders needs.

    Args:
        config: the run's options; `config.schema.Changeable` marks those that do not identify it.
        loaded: the model it starts from.
        data: what it is trained on, and what is held out.
        plan: its order, and the number of steps.
    """
    values, lora = config.model_dump(mode="json"), lora_options(config)
    projector = loaded.model.model.multi_modal_projector if config.projector_from else None
    identity = {name: values[name] for name in identifying()} | {
        "base_model": fingerprint(loaded.path),
        "projector": sum(float(p.double().sum()) for p in projector.parameters()) if projector is not None else None,
        "data": [data.index.fingerprint, *data.mixture.draws, _checksum(data.mixture.rows)],
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
        "held_out": data.held_out.records if data.held_out is not None else None,
        "earlier_held_out": [],
        "identity": identity,
        "config": values,
    }


def note_earlier(run: dict[str, Any], before: dict[str, Any]) -> None:
    """Note in a run's description which other records it held out before: it may have trained on those of now.

    Args:
        run: of now.
        before: of the checkpoint that it goes on from.
    """
    earlier = list(before.get("earlier_held_out", []))
    if before.get("held_out") != run["held_out"]:
        earlier.append(before.get("held_out"))
    run["earlier_held_out"] = earlier


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
