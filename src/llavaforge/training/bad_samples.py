"""What a run left out, under `on_bad_sample: skip`: bounded, listed, counted; never replaced.

Comes in: faults of records (when the data is opened) and of images (step by step). Goes out:
`output_dir/bad_samples.jsonl`. One
line (step 0: left out when the data was prepared):

    {"step": 17, "held_out": false, "kind": "truncated_image", "file": "chat.json", "row": 3, "id": "a", "message": ...,
     "path": "a.jpg"}
"""

import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llavaforge.data.faults import Fault
from llavaforge.errors import UserError
from llavaforge.files import append_line, read_json_lines, replace_text, to_json

logger = logging.getLogger(__name__)

BAD_SAMPLES = "bad_samples.jsonl"


class BadSamples:
    """The samples that a run leaves out.

    Args:
        output_dir: of the run.
        left_out: records that never came into the index.
        bound: `max_bad_samples`.
        is_writer: whether this process writes the file.
    """

    def __init__(self, output_dir: Path, left_out: Sequence[Fault], bound: int, is_writer: bool) -> None:
        self._path, self._left_out, self._bound, self._is_writer = output_dir / BAD_SAMPLES, left_out, bound, is_writer
        self._seen: dict[str, None] = {}

    def resume(self, start_step: int, seen: Sequence[str]) -> None:
        """Begin, or go on after `start_step`: lines of steps that will be done again are dropped.

        Args:
            start_step: steps done.
            seen: `in_images` of the checkpoint.
        """
        self._seen = dict.fromkeys(seen)
        if not self._is_writer:
            return
        lines = read_json_lines(self._path)
        kept = [line for line in lines if isinstance(line.get("step"), int) and 0 < line["step"] <= start_step]
        kept = [_line(0, False, fault) for fault in self._left_out] + kept
        if kept or self._path.is_file():
            replace_text(self._path, "".join(to_json(line) + "\n" for line in kept))

    @property
    def in_images(self) -> list[str]:
        """The names of the records that a step had to leave out, each once."""
        return list(self._seen)

    def __len__(self) -> int:
        return len(self._left_out) + len(self._seen)

    def add(self, step: int, faults: Sequence[Fault], held_out: bool = False) -> None:
        """Leave out the samples of a step; each is listed once, with the first step that met it.

        Raises:
            UserError: they are more than `max_bad_samples` now.
        """
        new = {fault.where: fault for fault in faults if fault.where not in self._seen}
        if len(self) + len(new) > self._bound:
            raise UserError(
                f"step {step} has {len(new)} more samples that cannot be read, which makes "
                f"{len(self) + len(new)}, over max_bad_samples {self._bound}. The first of them: "
                f"{next(iter(new.values()))}"
            )
        self._seen |= dict.fromkeys(new)
        if not self._is_writer:
            return
        for fault in new.values():
            logger.warning("left out: %s", fault)
            append_line(self._path, _line(step, held_out, fault))

    def log_summary(self) -> None:
        """Say at the end what was left out."""
        if len(self) and self._is_writer:
            logger.warning(
                "left out %d bad records (%d when the data was prepared, %d in steps): %s lists them",
                len(self), len(self._left_out), len(self._seen), self._path,
            )  # fmt: skip


def _line(step: int, held_out: bool, fault: Fault) -> dict[str, Any]:
    return {"step": step, "held_out": held_out, **asdict(fault)}
