"""What is measured: one row, one process. All choices of the benchmark are in this file."""

from dataclasses import dataclass, field
from typing import Any, Literal

from llavaforge.machine.random_model import PUBLISHED, TINY, ModelSize
from llavaforge.machine.speed import Work

SIZES: dict[str, ModelSize] = {"published": PUBLISHED, "tiny": TINY}
TEXT_TOKENS = {"captions": (24, 64), "instructions": (50, 300)}  # beside the image; stage 1, stage 2
USUAL_BATCHES = (8, 16, 32)  # samples per micro-batch that the usual way is tried with


@dataclass(frozen=True)
class Row:
    """One measurement; travels to its process as JSON.

    Attributes:
        size: of the model (`SIZES`).
        side: llavaforge, or the usual way (`bench/gpu/usual.py`).
        train_type: what learns.
        num_samples: of a micro-batch.
        num_micro_batches: of a step.
        data: `captions` or `instructions`, for the samples' lengths.
        compile: whether layers are compiled.
        recompute_every: every how many layers one is recomputed (0: none).
        deepspeed: as in a recipe.
        liger: whether liger's kernels are used where layers are not compiled.
        options: further options of a recipe.
    """

    train_type: str
    num_samples: int = 16
    num_micro_batches: int = 1
    side: Literal["ours", "usual"] = "ours"
    size: str = "published"
    data: str = "captions"
    compile: bool = False
    recompute_every: int = 0
    deepspeed: str | None = None
    liger: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def work(self) -> Work:
        """What our side does."""
        return Work(
            SIZES[self.size],
            self.train_type,
            self.num_samples,
            self.num_micro_batches,
            TEXT_TOKENS[self.data],
            self.compile,
            self.recompute_every,
            self.deepspeed,
            self.liger,
            tuple(self.options.items()),
        )

    @property
    def title(self) -> str:
        """For the table."""
        how = ["compiled"] * self.compile
        if self.recompute_every:
            how.append(f"1 of {self.recompute_every} layers recomputed")
        how += ["liger"] * self.liger
        how += [self.deepspeed] if self.deepspeed else []
        how += [f"{key} {value}" for key, value in self.options.items()]
        side = "llavaforge" if self.side == "ours" else "the usual way"
        batch = f"{self.num_samples} x {self.num_micro_batches}"
        return f"{self.train_type:<14}{self.data:<13}{batch:<8}{side}{', ' if how else ''}{', '.join(how)}"


ROWS: tuple[Row, ...] = (
    Row("projector", side="usual"),
    Row("projector"),
    Row("projector", compile=True),
    Row("projector", liger=True),
    Row("projector", compile=True, recompute_every=1),
    Row("projector", compile=True, recompute_every=4),
    Row("use_lora", side="usual", data="instructions"),
    Row("use_lora", data="instructions"),
    Row("use_lora", compile=True, data="instructions"),
    Row("use_lora", compile=True, recompute_every=1, data="instructions"),
    Row("freeze_vision", 8, 4, side="usual", data="instructions"),
    Row("freeze_vision", 8, 4, data="instructions"),
    Row("freeze_vision", 12, 4, compile=True, data="instructions"),
    Row("full", 12, 4, compile=True, data="instructions"),
    Row("full", 12, 4, compile=True, data="instructions", options={"optim": "adamw_8bit"}),
    Row("full", 8, 4, compile=True, data="instructions", deepspeed="zero2"),
    Row("full", 8, 4, data="instructions", deepspeed="zero3"),
    Row("full", 8, 4, data="instructions", deepspeed="zero3", liger=True),
    Row("projector", 16, compile=True, data="instructions"),
    Row("use_lora", 16, compile=True),
)
