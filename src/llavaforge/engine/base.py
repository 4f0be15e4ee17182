"""What a training loop needs of an engine, and nothing else. All distributed code lives behind this and `world.py`.

Comes in: a `StepModule` and `Group`s. Goes out: gradients, steps, the state to save.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from llavaforge.config.schema import TrainConfig
from llavaforge.data.load.pack import Pack
from llavaforge.model.step import StepModule
from llavaforge.model.trainable import Group
from llavaforge.processes.world import World


@dataclass(frozen=True)
class AdamWOptions:
    """AdamW's numbers (Loshchilov & Hutter 2019, arXiv:1711.05101) and the clipping norm (0: none).

    With `moments_in_8_bits` the moments are stored in blocks of 8-bit numbers (Dettmers et al. 2022, arXiv:2110.02861).
    """

    beta1: float
    beta2: float
    epsilon: float
    max_grad_norm: float
    moments_in_8_bits: bool = False

    @classmethod
    def of(cls, config: TrainConfig) -> "AdamWOptions":
        """Read them from a run's options."""
        betas = config.adam_beta1, config.adam_beta2
        return cls(*betas, config.adam_epsilon, config.max_grad_norm, config.optim == "adamw_8bit")

    @property
    def betas(self) -> tuple[float, float]:
        """Both decays, as torch takes them."""
        return self.beta1, self.beta2


@dataclass(frozen=True)
class StepResult:
    """What an optimizer step did.

    Attributes:
        grad_norm: Euclidean norm of the whole gradient before clipping.
        skipped: the step did not happen because the norm was not finite.
    """

    grad_norm: float
    skipped: bool


@dataclass(frozen=True)
class ParameterState:
    """A trainable parameter's float32 weight and AdamW moments, full shape, on the CPU."""

    weight: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor


class Engine(Protocol):
    """One process of a run (`world`: all of them).

    Attributes:
        name: as `engine/memory.py` calls it.
        has_whole_weights: whether a layer finds all its weights when it runs.
    """

    world: World
    name: str
    has_whole_weights: bool

    def prepare(
        self, step_module: StepModule, groups: Sequence[Group], options: AdamWOptions, dtype: torch.dtype
    ) -> None:
        """Take the model over: move it, keep float32 masters of what learns, compute in `dtype`."""

    def restore(self, states: Mapping[str, ParameterState], num_steps: int) -> None:
        """Set masters, moments and AdamW's step count to a saved state, one parameter in memory at a time."""

    def micro_step(self, pack: Pack, scale: float) -> torch.Tensor:
        """Run forward and backward of `scale * loss_sum`.

        Returns:
            The unscaled `loss_sum` of this process, a scalar on the device: to read it is to wait for the device.
        """

    def step(self, rate_factor: float) -> StepResult:
        """Clip and apply the gradient with each group's peak rate times `rate_factor`."""

    def loss_sum(self, pack: Pack) -> float:
        """Return this process's summed loss without gradients; all processes call it equally often."""

    def local(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        """Return what this process holds of a parameter: all of it, or under ZeRO-3 its share."""

    def local_masters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield what this process holds of every float32 master, by module name; it may be empty."""

    def masters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield every master by module name, full shape, on the CPU, to the writer; all iterate to the end."""

    def trainable_state(self) -> Iterator[tuple[str, ParameterState]]:
        """Yield the state of the parameters that this process writes, by module name, one at a time.

        Each parameter goes to one process, about the same number of bytes to each. All iterate to the end.
        """

    def peak_memory_bytes(self) -> int:
        """Return the most memory this process has held (the device's, or the process's on a CPU)."""
