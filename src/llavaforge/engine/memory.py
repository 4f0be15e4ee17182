"""What each engine keeps on a device from step to step: weights, gradients, masters, moments, buffers.

Arithmetic: read from `engine/plain.py` and from DeepSpeed 0.19.8 (`runtime/bf16_optimizer.py`, `runtime/engine.py`,
`runtime/zero/stage_1_and_2.py`, `stage3.py`) with the shipped files, in bfloat16. Without torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MAX_LIVE = 1_000_000_000
"""DeepSpeed's default of `stage3_max_live_parameters`, which the shipped files leave as it is."""
_BUCKET = 500_000_000  # `reduce_bucket_size` of the shipped ZeRO-2 files


@dataclass(frozen=True)
class Counts:
    """Numbers of parameters: of the whole model, of what learns, of the largest tensor that learns."""

    total: int
    learning: int
    largest: int

    @classmethod
    def of(cls, model: Any) -> "Counts":
        """Count a model whose parameters are already frozen or free."""
        learning = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
        return cls(sum(parameter.numel() for parameter in model.parameters()), sum(learning), max(learning))


def stage_of(settings: Mapping[str, Any]) -> int:
    """Return the ZeRO stage."""
    return int(settings["zero_optimization"]["stage"])


def offloads_optimizer(settings: Mapping[str, Any]) -> bool:
    """Say whether the optimizer runs on the CPU."""
    return settings["zero_optimization"].get("offload_optimizer", {}).get("device", "none") != "none"


def engine_name(settings: Mapping[str, Any] | None) -> str:
    """Return how `engine_memory` calls a run's engine, by its DeepSpeed settings."""
    if settings is None:
        return "plain"
    return f"zero{stage_of(settings)}" + ("-offload" if offloads_optimizer(settings) else "")


@dataclass(frozen=True)
class EngineMemory:
    """What an engine keeps on a process's device at the worst moment, in bytes: activations and logits are not its.

    Attributes:
        weights: in the type that is computed in.
        gradients: of what learns.
        optimizer: masters and moments of what learns.
        buffers: for what is sent, gathered or computed in passing.
    """

    weights: float
    gradients: float
    optimizer: float
    buffers: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.buffers

    def peak(self, activations: float, of_images: float = 0.0, gradient_stays: bool = True) -> float:
        """Return the whole at the worst moment of a step.

        Args:
            activations: of a micro-batch, all of them.
            of_images: what of them tower and projector keep, which the backward pass comes to last.
            gradient_stays: an earlier micro-batch's gradient is there already. Else it grows as the activations are
                freed: either all of them are there, or the gradient and those of the images.
        """
        if gradient_stays:
            return self.total + activations
        return self.total - self.gradients + max(activations, self.gradients + of_images)


def gradient_stays(engine: str, num_micro_batches: int) -> bool:
    """Say whether an engine holds a gradient while a step's last micro-batch has its activations."""
    return engine != "plain" or num_micro_batches > 1


def engine_memory(
    engine: str, counts: Counts, num_processes: int, weight_bytes: int = 2, moments_in_8_bits: bool = False
) -> EngineMemory:
    """Return what an engine keeps.

    plain: the weights; what learns: master 4 (in float32 a weight is its own), gradient 4, moments 8, in 8 bits 2.
    zero1: of what learns, every process keeps the gradient twice (bfloat16 of the micro-step, float32 of the step);
        before the reduction, when the activations are gone, all of it is copied once more in float32 and once in
        bfloat16. Masters and moments dealt. (On offloading, and in float32, it is ZeRO-2 with whole gradients.)
    zero2: gradients dealt as well; two buckets of bfloat16 (`overlap_comm`) that hold no more than what learns, a copy
        of one to send, the largest gradient. Later AdamW makes one temporary tensor as large as a moment.
    zero3: weights dealt as well, frozen ones too; up to `MAX_LIVE` of them are gathered.
    offload: masters and moments on the host. ZeRO-2 accumulates its share of the gradient on the GPU.
    """
    learning, dealt = counts.learning, counts.learning / num_processes
    whole, largest = float(weight_bytes) * counts.total, float(weight_bytes) * counts.largest
    buckets = 3.0 * weight_bytes * min(_BUCKET, learning) + largest
    gathered = float(weight_bytes) * min(MAX_LIVE, counts.total) + largest
    plain = (4 if weight_bytes < 4 else 0) + (2 if moments_in_8_bits else 8)
    return {
        "plain": EngineMemory(whole, 4 * learning, plain * learning, largest),
        "zero1": EngineMemory(whole, 6 * learning, 12 * dealt, 6 * learning),
        "zero2": EngineMemory(whole, 4 * dealt, 12 * dealt, max(buckets, 4 * dealt)),
        "zero3": EngineMemory(whole / num_processes, 4 * dealt, 12 * dealt, max(gathered, 4 * min(1e9, dealt))),
        "zero1-offload": EngineMemory(whole, 4 * learning, 0, buckets + largest),
        "zero2-offload": EngineMemory(whole, 4 * dealt, 0, buckets + largest),
        "zero3-offload": EngineMemory(whole / num_processes, 0, 0, gathered),
    }[engine]
