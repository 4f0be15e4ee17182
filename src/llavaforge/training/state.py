"""Where a run stands: the small, exact part of a checkpoint (tensors are in `checkpoint/state.py`)."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, NonNegativeFloat, NonNegativeInt, TypeAdapter

from llavaforge.checkpoint.state import PREFIX, TRAIN_STATE
from llavaforge.errors import reading
from llavaforge.files import to_json


@dataclass
class TrainState:
    """Counts since the run began, over all ranks; they continue through a resume.

    Attributes:
        step: optimizer steps done.
        num_samples: samples seen.
        num_tokens: tokens seen, image tokens included.
        num_supervised: supervised tokens seen.
        loss_sum: cross-entropy summed over them.
        num_skipped: steps whose gradient was not finite and that changed nothing.
        num_moving_steps: steps that were taken with a learning rate above zero.
        train_time_s: seconds spent in steps.
        model_flops: model FLOPs done in them.
        eval_loss: newest held-out loss, or None.
        best_metric: best value of `metric_for_best_model` so far, or None.
        best_step: the step where it was measured.
        num_worse: evaluations since then.
        judged_by: what these three are about: the metric, and of which held-out data.
        bad_samples: what messages call the records that steps left out (`on_bad_sample: skip`).
    """

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)

    step: NonNegativeInt = 0
    num_samples: NonNegativeInt = 0
    num_tokens: NonNegativeInt = 0
    num_supervised: NonNegativeInt = 0
    loss_sum: float = 0.0
    num_skipped: NonNegativeInt = 0
    num_moving_steps: NonNegativeInt = 0
    train_time_s: NonNegativeFloat = 0.0
    model_flops: NonNegativeFloat = 0.0
    eval_loss: float | None = None
    best_metric: float | None = None
    best_step: int | None = None
    num_worse: NonNegativeInt = 0
    judged_by: str = ""
    bad_samples: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, values: Mapping[str, Any], folder: Path) -> "TrainState":
        """Return the state that a checkpoint holds.

        Raises:
            UserError: it is none.
        """
        with reading(folder / TRAIN_STATE, "Give another checkpoint."):
            state = TypeAdapter(cls).validate_json(to_json(values))  # strictly: no text is taken for a number
            name = folder.name.partition(".superseded")[0]
            if name.startswith(PREFIX) and name != f"{PREFIX}{state.step}":
                raise ValueError(f"it is of step {state.step}")
            return state

    def judge_by(self, what: str) -> bool:
        """Let evaluations be judged by this from now on; say whether earlier ones, judged otherwise, are forgotten."""
        forgets = self.best_step is not None and self.judged_by != what
        if self.judged_by != what:
            self.judged_by, self.best_metric, self.best_step, self.num_worse = what, None, None, 0
        return forgets

    def add_evaluation(self, value: float, lowest_is_best: bool) -> bool:
        """Note an evaluation of this step; say whether it is the best so far (what is no number never is)."""
        sign = -1 if lowest_is_best else 1
        is_best = not math.isnan(value) and (self.best_metric is None or sign * value > sign * self.best_metric)
        if is_best:
            self.best_metric, self.best_step, self.num_worse = value, self.step, 0
        else:
            self.num_worse += 1
        return is_best

    @property
    def train_loss(self) -> float:
        """Mean loss per supervised token over the whole run."""
        return self.loss_sum / max(1, self.num_supervised)

    def as_json(self) -> dict[str, Any]:
        """Return plain values; `TrainState(**values)` is the way back."""
        return asdict(self)
