"""What identifies a run: two starts with the same identity train the same model, to the bit on one machine.

Comes in: a run's options and what it reads. Goes out: plain JSON that stands in every `run.json`; and what differs
between two of them.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from llavaforge.config.schema import TrainConfig, identifying
from llavaforge.data.index.index import SampleIndex
from llavaforge.data.order.mixture import Mixture, RowNumbers
from llavaforge.errors import UserError
from llavaforge.files import fingerprint
from llavaforge.model.load import LoadedModel
from llavaforge.model.trainable import lora_options
from llavaforge.version import __version__


def describe_run(
    config: TrainConfig, loaded: LoadedModel, index: SampleIndex, mixture: Mixture, global_batch_size: int
) -> dict[str, Any]:
    """Return what stands in every `run.json`: what identifies the run, and what a reader of its folders needs.

    Args:
        config: the run's options; `config.schema.Changeable` marks those that do not identify it.
        loaded: the model it starts from.
        index: all its data.
        mixture: what of it an epoch holds.
        global_batch_size: samples per step.
    """
    values, lora = config.model_dump(mode="json"), lora_options(config)
    projector = loaded.model.model.multi_modal_projector if config.projector_from else None
    identity = {name: values[name] for name in identifying()} | {
        "base_model": fingerprint(loaded.path),
        "projector": sum(float(p.double().sum()) for p in projector.parameters()) if projector is not None else None,
        "data": [index.fingerprint, *mixture.draws, _checksum(mixture.rows)],
        "global_batch_size": global_batch_size,
    }
    return {
        "llavaforge": __version__,
        "train_type": config.train_type,
        "base_model": str(loaded.path.absolute()),
        "lora": asdict(lora) if lora is not None else None,
        "data": [entry.model_dump(mode="json", exclude_defaults=True) for entry in config.entries],
        "identity": identity,
        "config": values,
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


def _checksum(rows: Sequence[RowNumbers]) -> str:
    """Identify which rows of the data take part (quarantine, held-out records)."""
    return hashlib.sha256(b"".join(np.ascontiguousarray(mine).tobytes() for mine in rows)).hexdigest()[:16]
