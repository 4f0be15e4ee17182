"""The train types, one row each: what learns, at which rate, and whether the language model gets a LoRA."""

from dataclasses import dataclass
from typing import Literal

TrainType = Literal["full", "freeze_vision", "use_lora", "projector"]
PartName = Literal["vision_tower", "projector", "language_model", "lora"]


@dataclass(frozen=True)
class WhatLearns:
    """One train type.

    Attributes:
        parts: what learns of the model; `learning_rate` is that of the last one.
        learning_rate: its default.
        projector_learning_rate: the projector's default; None: that of `learning_rate`.
    """

    parts: tuple[PartName, ...]
    learning_rate: float
    projector_learning_rate: float | None = None

    @property
    def uses_lora(self) -> bool:
        """Whether what is trained of the language model is a LoRA, and a run leaves an adapter."""
        return "lora" in self.parts


# LLaVA's published rates (haotian-liu/LLaVA, scripts/v1_5): 1e-3 stage 1, 2e-5 full, 2e-4 LoRA with projector 2e-5.
TRAIN_TYPES: dict[TrainType, WhatLearns] = {
    "projector": WhatLearns(("projector",), 1e-3),
    "freeze_vision": WhatLearns(("projector", "language_model"), 2e-5),
    "use_lora": WhatLearns(("projector", "lora"), 2e-4, projector_learning_rate=2e-5),
    "full": WhatLearns(("vision_tower", "projector", "language_model"), 2e-5),
}
