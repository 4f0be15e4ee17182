"""What is measured: sizes of the model, scenarios, contenders. All choices of the benchmark are in this file."""

import importlib.util
from dataclasses import dataclass, field
from typing import Literal

from llavaforge.machine.random_model import PUBLISHED, REPLICA, ModelSize

Side = Literal["ours", "usual", "usual_workers", "trl"]
Data = Literal["captions", "instructions"]

SIDE_TITLES: dict[Side, str] = {
    "ours": "llavaforge",
    "usual": "the usual way",
    "usual_workers": "... with 2 loader workers",
    "trl": "TRL's SFTTrainer",
}
NUM_WORKERS: dict[Side, int] = {"ours": 2, "usual": 0, "usual_workers": 2, "trl": 2}


REAL = "CLIP-L/336 + Qwen1.5-4B"
SIZES: dict[str, ModelSize] = {
    REAL: PUBLISHED,
    # The same share of work per part at a 120th of the parameters (`bench/race/shares.py` prints both).
    "replica": REPLICA,
    # For the tests: seconds, not minutes; its figures mean nothing.
    "tiny": ModelSize(56, 32, 64, 2, 2, 64, 128, 2, 2, 1_000),
}


@dataclass(frozen=True)
class Scenario:
    """One race.

    Attributes:
        data: which samples.
        train_type: what learns.
        learning_rate: of all that learns, on every side.
        bar: how many times the samples per second of the usual way ours must reach.
        sides: who takes part.
    """

    data: Data
    train_type: Literal["projector", "freeze_vision", "use_lora"]
    learning_rate: float
    bar: float
    sides: tuple[Side, ...]

    @property
    def name(self) -> str:
        """Data and train type."""
        return f"{self.data}-{self.train_type}"


# Not a part of llavaforge's environment: it races where it is installed.
_TRL: tuple[Side, ...] = ("trl",) if importlib.util.find_spec("trl") else ()

# LLaVA's stage 1 and stage 2 with its learning rates.
SCENARIOS: tuple[Scenario, ...] = (
    Scenario("captions", "projector", 1e-3, 1.5, ("ours", "usual", "usual_workers", *_TRL)),
    Scenario("instructions", "freeze_vision", 2e-5, 1.7, ("ours", "usual")),
    Scenario("instructions", "use_lora", 2e-4, 1.7, ("ours", "usual")),
)

# Common at a width of 2560: r=32 on q, k, v, o. At a width of 512, r=8 is about the same share of the parameters.
LORA_R, LORA_ALPHA = 8, 16
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class Task:
    """What one contender has to do; travels to its process as JSON."""

    model: str
    data: str
    order: list[int]
    output_dir: str
    cache_dir: str
    train_type: Literal["projector", "freeze_vision", "use_lora"]
    learning_rate: float
    batch_size: int
    num_steps: int
    num_workers: int
    bf16: bool
    compile: bool  # ours alone: as `auto` does in runs that are long enough
    lora_r: int = LORA_R
    lora_alpha: int = LORA_ALPHA
    lora_targets: list[str] = field(default_factory=lambda: list(LORA_TARGETS))


HELP_BAR_S = 0.5
