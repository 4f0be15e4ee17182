"""What learns: from a train type to parameters with their parts and learning rates.

Comes in: a stock Llava and a train type. Goes out: `Group`s for the engine; everything else is frozen.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from llavaforge.config.schema import TrainConfig, TrainType
from llavaforge.model.lora import LoraOptions, add_lora, is_lora
from llavaforge.model.tower import unused_modules

Part = Literal["vision_tower", "projector", "language_model", "lora"]

# The parts that learn, per train type (design, section 4).
LEARNS: dict[TrainType, tuple[Part, ...]] = {
    "projector": ("projector",),
    "freeze_vision": ("projector", "language_model"),
    "use_lora": ("projector", "lora"),
    "full": ("vision_tower", "projector", "language_model"),
}

# LLaVA's published rates (haotian-liu/LLaVA, scripts/v1_5): 1e-3 stage 1, 2e-5 full, 2e-4 LoRA with projector 2e-5.
DEFAULT_LEARNING_RATE: dict[TrainType, float] = {
    "projector": 1e-3,
    "freeze_vision": 2e-5,
    "use_lora": 2e-4,
    "full": 2e-5,
}
_LORA_PROJECTOR_LEARNING_RATE = 2e-5
# LLaVA-NeXT trains its tower at 2e-6 beside 1e-5, a fifth; a tenth is on the safe side of it.
_VISION_SHARE = 0.1


@dataclass(frozen=True)
class Group:
    """Parameters that share a learning rate and a weight decay.

    Attributes:
        part: what of the model they are.
        learning_rate: at the top of the schedule.
        weight_decay: AdamW's.
        parameters: by module name.
    """

    part: Part
    learning_rate: float
    weight_decay: float
    parameters: dict[str, nn.Parameter]

    @property
    def num_parameters(self) -> int:
        """Number of scalars that learn."""
        return sum(parameter.numel() for parameter in self.parameters.values())


def part_of(name: str) -> Part:
    """Return the part that a parameter of a stock Llava belongs to, by its module name."""
    if is_lora(name):
        return "lora"
    if name.startswith("model.vision_tower."):
        return "vision_tower"
    if name.startswith("model.multi_modal_projector."):
        return "projector"
    return "language_model"


def select(model: Any, config: TrainConfig) -> list[Group]:
    """Freeze everything, then free what the train type lets learn.

    Args:
        model: a stock Llava; under `use_lora` it gets its LoRA layers here.
        config: train type, learning rates, LoRA options.

    Returns:
        Groups in the order of `LEARNS`, matrices (decayed) before vectors (not decayed).
    """
    if config.train_type == "use_lora":
        add_lora(model, lora_options(config), config.seed)
    model.requires_grad_(False)
    never = {id(p) for module in unused_modules(model) for p in module.parameters()}
    groups = []
    for part in LEARNS[config.train_type]:
        mine = {n: p for n, p in model.named_parameters() if part_of(n) == part and id(p) not in never}
        for parameter in mine.values():
            parameter.requires_grad_(True)
        rate = learning_rate(config, part)
        for decay, chosen in _by_decay(mine, config.weight_decay):
            groups.append(Group(part, rate, decay, chosen))
    return groups


def learning_rate(config: TrainConfig, part: Part) -> float:
    """Return the peak learning rate of a part."""
    base = config.learning_rate
    if base is None:
        base = DEFAULT_LEARNING_RATE[config.train_type]
    if part == "projector":
        default = _LORA_PROJECTOR_LEARNING_RATE if config.train_type == "use_lora" else base
        return default if config.projector_learning_rate is None else config.projector_learning_rate
    if part == "vision_tower":
        return base * _VISION_SHARE if config.vision_learning_rate is None else config.vision_learning_rate
    return base


def lora_options(config: TrainConfig) -> LoraOptions:
    """Return the LoRA options of a run."""
    return LoraOptions(config.lora_r, config.lora_alpha, config.lora_dropout, tuple(config.lora_target_modules))


def _by_decay(
    parameters: dict[str, nn.Parameter], weight_decay: float
) -> Iterator[tuple[float, dict[str, nn.Parameter]]]:
    """Biases and norms are not decayed."""
    matrices = {name: parameter for name, parameter in parameters.items() if parameter.ndim > 1}
    vectors = {name: parameter for name, parameter in parameters.items() if parameter.ndim <= 1}
    if matrices:
        yield weight_decay, matrices
    if vectors:
        yield 0.0, vectors
