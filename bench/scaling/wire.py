"""Bytes that one process sends in a training step: a formula per ZeRO stage, and what counted collectives come to.

The formulas are read from DeepSpeed 0.19.8 (`runtime/bf16_optimizer.py`, `runtime/zero/stage_1_and_2.py`, `stage3.py`,
`partitioned_param_coordinator.py`); `bench/scaling/run.py` measures how far they hold, `bench/scaling/paper.py` applies
them to the real model. Collectives are counted as a ring sends them (Patarasuk & Yuan 2009,
doi:10.1016/j.jpdc.2008.09.002): with N processes an all-reduce is 2 (N-1)/N of the tensor, an all-gather and a
reduce-scatter (N-1)/N of the whole one.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llavaforge.engine.memory import MAX_LIVE, Counts
from llavaforge.model.tower import unused_modules
from llavaforge.model.trainable import part_of

# How often a ring sends (N-1)/N of the tensor.
_PASSES = {"all_reduce": 2, "all_gather_into_tensor": 1, "reduce_scatter_tensor": 1, "broadcast": 1, "reduce": 1}


@dataclass(frozen=True)
class Weights:
    """Numbers of parameters, as ZeRO moves them.

    Attributes:
        total: all of the model, LoRA included.
        learning: what learns.
        largest: of the largest tensor that learns.
        forward: what ZeRO-3 gathers for a forward pass, frozen or not; without what no feature depends on.
        backward: what of it the backward pass needs again: what learns, and frozen matrices that gradients pass.
        recomputed: what gradient checkpointing gathers on top of that.
        persistent: too small to be dealt to the processes; gathered once after the step.
    """

    total: int
    learning: int
    largest: int
    forward: int
    backward: int
    recomputed: int
    persistent: int

    @property
    def counts(self) -> Counts:
        """What an engine's memory depends on."""
        return Counts(self.total, self.learning, self.largest)

    @classmethod
    def of(cls, model: Any, threshold: int, gradient_checkpointing: bool) -> "Weights":
        """Count a stock Llava whose parameters are already frozen or free.

        Args:
            model: it may lie on the meta device.
            threshold: `stage3_param_persistence_threshold`.
            gradient_checkpointing: of the language model's layers. A recomputation costs no further gather where
                what it fetched stays for the backward pass; that of a frozen matrix (LoRA's base) does not stay.
        """
        never = {id(p) for module in unused_modules(model) for p in module.parameters()}
        named = list(model.named_parameters())
        dealt = [(n, p) for n, p in named if p.numel() > threshold and id(p) not in never]
        learns = {part_of(n) for n, p in named if p.requires_grad}

        def is_back(name: str) -> bool:
            if "embed_tokens" in name or part_of(name) == "vision_tower":  # nothing before them asks for a gradient
                return part_of(name) in learns
            return True

        layers = [p for n, p in dealt if ".language_model.layers." in n and not p.requires_grad]
        free = [p.numel() for _, p in named if p.requires_grad]
        return cls(
            total=sum(p.numel() for _, p in named),
            learning=sum(free),
            largest=max(free),
            forward=sum(p.numel() for _, p in dealt),
            backward=sum(p.numel() for n, p in dealt if is_back(n)),
            recomputed=sum(p.numel() for p in layers) if gradient_checkpointing else 0,
            persistent=sum(p.numel() for _, p in named if p.numel() <= threshold),
        )


def formula(
    stage: int, weights: Weights, num_processes: int, micro_steps: int, element_bytes: int, max_live: int = MAX_LIVE
) -> dict[str, float]:
    """Return the bytes that a process sends per optimizer step, by collective.

    * ZeRO-1 reduces gradients once per step, ZeRO-2 in every micro-step. Both all-reduce (ZeRO-2 as well, unless
      `use_multi_rank_bucket_allreduce` is false), in the compute type: twice what a reduce-scatter would send. Then the
      weights that learn are gathered once.
    * ZeRO-3 gathers every weight that the forward pass uses, frozen ones too, in every micro-step, and again for the
      backward pass, all but the last `max_live` ones: it fetches ahead until so many are there, and what is still there
      when it looks at the backward pass stays. A model smaller than `max_live` is gathered once. Where frozen matrices
      are recomputed hardly anything stays of a larger one: counted as nothing. Gradients are reduce-scattered in every
      micro-step.

    Args:
        stage: 1, 2 or 3.
        weights: of the model.
        num_processes: N.
        micro_steps: of one process per optimizer step.
        element_bytes: of the type in which is computed: 2 for bfloat16, 4 for float32.
        max_live: `stage3_max_live_parameters`; `stage3_max_reuse_distance` not above it.
    """
    once = element_bytes * (num_processes - 1) / num_processes
    if stage < 3:
        num_reductions = 1 if stage == 1 else micro_steps
        return {
            "all_reduce": 2 * once * weights.learning * num_reductions,
            "all_gather_into_tensor": once * weights.learning,
        }
    all_stay, some_stay = weights.backward <= max_live, not weights.recomputed
    stay = weights.backward if all_stay else max_live if some_stay else 0
    again = weights.backward - stay + weights.recomputed
    return {
        "all_gather_into_tensor": once * (micro_steps * (weights.forward + again) + weights.persistent),
        "reduce_scatter_tensor": once * weights.learning * micro_steps,
    }


def ring_bytes(tensors: Mapping[str, float], num_processes: int) -> dict[str, float]:
    """Return what a ring sends for counted collectives.

    Args:
        tensors: bytes of the whole tensors, by collective.
        num_processes: N.
    """
    share = (num_processes - 1) / num_processes
    return {name: _PASSES[name] * share * number for name, number in tensors.items()}


def gloo_bytes(tensors: Mapping[str, float], num_processes: int) -> float:
    """Return what gloo sends for them: it has no reduce-scatter, and all-reduces the whole tensor instead."""
    sent = ring_bytes(tensors, num_processes)
    return sum(sent.values()) + sent.get("reduce_scatter_tensor", 0.0)
