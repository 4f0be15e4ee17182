"""What learns: from a train type to parameters with their parts and learning rates.

Comes in: a stock Llava and a train type. Goes out: `Group`s for the engine; everything else is frozen.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from llavaforge.config.schema import DataOptions, TrainConfig
from llavaforge.config.train_types import TRAIN_TYPES, PartName
from llavaforge.model.lora import LoraOptions, add_lora, is_lora
from llavaforge.model.tower import unused_modules

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
        shapes: theirs, by module name; taken at the beginning, since ZeRO-3 leaves no process a whole parameter.
    """

    part: PartName
    learning_rate: float
    weight_decay: float
    parameters: dict[str, nn.Parameter]
    shapes: dict[str, torch.Size] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "shapes", {name: parameter.shape for name, parameter in self.parameters.items()})

    @property
    def num_parameters(self) -> int:
        """Number of scalars that learn."""
        return sum(shape.numel() for shape in self.shapes.values())


def part_of(name: str) -> PartName:
    """Return the part that a parameter of a stock Llava belongs to, by its module name."""
    if is_lora(name):
        return "lora"
    if name.startswith("model.vision_tower."):
        return "vision_tower"
    if name.startswith("model.multi_modal_projector."):
        return "projector"
    return "language_model"


def set_trainable(model: Any, options: DataOptions) -> dict[PartName, dict[str, nn.Parameter]]:
    """Freeze everything, then free what the train type lets learn.

    Args:
        model: a stock Llava, also one without weights; for a LoRA train type it gets its LoRA layers here.
        options: train type, LoRA options, seed.

    Returns:
        What learns, by part and module name.
    """
    if (lora := lora_options(options)) is not None:
        add_lora(model, lora, options.seed)
    model.requires_grad_(False)
    never = {id(p) for module in unused_modules(model) for p in module.parameters()}
    learning: dict[PartName, dict[str, nn.Parameter]] = {}
    for part in TRAIN_TYPES[options.train_type].parts:
        learning[part] = {n: p for n, p in model.named_parameters() if part_of(n) == part and id(p) not in never}
        for parameter in learning[part].values():
            parameter.requires_grad_(True)
    return learning


def parameter_groups(model: Any, config: TrainConfig) -> list[Group]:
    """Let learn what the train type says (`set_trainable`), and group it by learning rate and weight decay.

    Returns:
        Groups in the order of the train type's parts, matrices (decayed) before vectors (not decayed).
    """
    groups = []
    for part, parameters in set_trainable(model, config).items():
        matrices = {name: parameter for name, parameter in parameters.items() if parameter.ndim > 1}
        vectors = {name: parameter for name, parameter in parameters.items() if parameter.ndim <= 1}  # biases and norms
        for decay, chosen in ((config.weight_decay, matrices), (0.0, vectors)):
            if chosen:
                groups.append(Group(part, learning_rate(config, part), decay, chosen))
    return groups


def learning_rate(config: TrainConfig, part: PartName | None = None) -> float:
    """Return the peak learning rate of a part (by default the one that `learning_rate` names)."""
    what = TRAIN_TYPES[config.train_type]
    base = what.learning_rate if config.learning_rate is None else config.learning_rate
    part = part or what.parts[-1]
    if part == "projector":
        default = base if what.projector_learning_rate is None else what.projector_learning_rate
        return default if config.projector_learning_rate is None else config.projector_learning_rate
    if part == "vision_tower":
        return base * _VISION_SHARE if config.vision_learning_rate is None else config.vision_learning_rate
    return base


def lora_options(options: DataOptions) -> LoraOptions | None:
    """Return the LoRA options of a run, None for a train type without LoRA."""
    if not options.uses_lora:
        return None
    return LoraOptions(options.lora_r, options.lora_alpha, options.lora_dropout, tuple(options.lora_target_modules))


def cast_parameters(module: nn.Module, dtype: torch.dtype) -> None:
    """Cast parameters, not buffers: rounding a rotary embedding's `inv_freq` to bfloat16 moves every position."""
    for parameter in module.parameters():
        if parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)
