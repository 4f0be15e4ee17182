"""Where a run stands: the small, exact part of a checkpoint (tensors are in `checkpoint/state.py`)."""

from dataclasses import asdict, dataclass, field
from typing import Any


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
        num_moving_steps: steps with a learning rate above zero.
        train_time_s: seconds spent in steps.
        model_flops: model FLOPs done in them.
        eval_loss: newest held-out loss, or None.
        bad_samples: what messages call the records that steps left out (`on_bad_sample: skip`).
    """

    step: int = 0
    num_samples: int = 0
    num_tokens: int = 0
    num_supervised: int = 0
    loss_sum: float = 0.0
    num_skipped: int = 0
    num_moving_steps: int = 0
    train_time_s: float = 0.0
    model_flops: float = 0.0
    eval_loss: float | None = None
    bad_samples: list[str] = field(default_factory=list)

    @property
    def train_loss(self) -> float:
        """Mean loss per supervised token over the whole run."""
        return self.loss_sum / max(1, self.num_supervised)

    def as_json(self) -> dict[str, Any]:
        """Return plain values; `TrainState(**values)` is the way back."""
        return asdict(self)
