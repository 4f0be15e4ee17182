"""Several processes: DeepSpeed with ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054), started by torchrun or srun.

DeepSpeed averages gradients over ranks; we want their sum, so the scale is multiplied back here. What DeepSpeed decides
in silence (clipping at 1.0, accumulation in bfloat16) is set by `zero_config.py`.

Facts of DeepSpeed 0.19.8 that this file works around:

* The copy that computes follows the masters only in a step, and AdamW's moments exist only after one. So masters are
  set first; then, under ZeRO-1 and 2, one step of zero gradient at rate zero carries them over and makes the moments;
  under ZeRO-3, where such a step would need a forward pass, both are done by hand; then the moments are set.
* Under ZeRO-1 and 2 the moments of all parameter groups are linked once the first group has stepped, when the others
  have none yet: they are linked again.
* `safe_set_full_*` fails under ZeRO-3 where a parameter's size does not divide over the ranks: each rank sets its own
  shard.
"""

import heapq
import math
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from typing import Any

import torch
from torch import nn

from llavaforge.data.load.pack import Pack
from llavaforge.engine.base import AdamWOptions, ParameterState, StepResult
from llavaforge.engine.memory import engine_name, offloads_optimizer, stage_of
from llavaforge.engine.plain import peak_memory_bytes
from llavaforge.model.step import StepModule
from llavaforge.model.trainable import Group
from llavaforge.processes.world import World

_CLIP_NEVER = 1e30  # DeepSpeed reads 0 as "no clipping" but some of its optimizers then report no norm
_MOMENTS = ("exp_avg", "exp_avg_sq")


class ZeroEngine:
    """The engine of one of several processes; see `engine/base.py`.

    Args:
        world: joined; a process group exists.
        settings: of `zero_config.resolve`.
    """

    def __init__(self, world: World, settings: dict[str, Any]) -> None:
        with redirect_stdout(sys.stderr):  # it prints what it builds; our stdout is for results
            import deepspeed

            # On a CPU it would compile a shared-memory all-reduce: 100 s, under a lock that outlives a kill.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
            deepspeed.init_distributed(verbose=False)
        warnings.filterwarnings(
            "ignore", r"`torch\.distributed\..*` is deprecated", FutureWarning
        )  # how DeepSpeed calls it
        self.world, self.device = world, world.device
        self._deepspeed = deepspeed
        self._settings = settings
        self._shards_weights = stage_of(settings) == 3
        self.name = engine_name(settings)
        self.has_whole_weights = not self._shards_weights
        self._has_moments = False  # DeepSpeed makes AdamW's moments in the first step

    def prepare(
        self, step_module: StepModule, groups: Sequence[Group], options: AdamWOptions, dtype: torch.dtype
    ) -> None:
        """See `Engine.prepare`."""
        self._rates = [group.learning_rate for group in groups]
        self._parameters = {name: p for group in groups for name, p in group.parameters.items()}
        self._shapes = {name: p.shape for name, p in self._parameters.items()}
        # Kept as they are until the masters have their precision; weights mapped from a file take no memory.
        originals = {n: p.detach() for n, p in self._parameters.items() if p.dtype != dtype}
        step_module.runs_all_modules = self._shards_weights
        optimizer = self._optimizer_of(groups, options)
        settings = self._settings | {
            # Batch sizes are ours to count; DeepSpeed wants some.
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": options.max_grad_norm or _CLIP_NEVER,
            "zero_optimization": _with_buckets_that_fit(
                self._settings["zero_optimization"], sum(shape.numel() for shape in self._shapes.values())
            ),
        }
        with redirect_stdout(sys.stderr):
            self._take_weights(step_module, dtype, settings)
            self._engine, self._optimizer, *_ = self._deepspeed.initialize(
                model=step_module, optimizer=optimizer, config=settings
            )
        self._engine.train()
        if originals:
            for name, weight in originals.items():
                self._set_shard(name, weight)
            self._carry_over()

    def restore(self, states: Mapping[str, ParameterState], num_steps: int) -> None:
        """See `Engine.restore`."""
        for name, state in states.items():
            self._set_shard(name, state.weight)
        self._carry_over()
        for name, state in states.items():
            for key in _MOMENTS:
                self._set_shard(name, getattr(state, key), key)
        for moments in self._optimizer.optimizer.state.values():
            moments["step"] = self._step_count(num_steps)

    def micro_step(self, pack: Pack, scale: float) -> torch.Tensor:
        """See `Engine.micro_step`."""
        self._engine.set_gradient_accumulation_boundary(pack.source.is_last_of_step)
        loss: torch.Tensor = self._engine(pack.to(self.device))
        self._engine.backward(loss * (scale * self.world.size), scale_wrt_gas=False)
        return loss.detach()

    def step(self, rate_factor: float) -> StepResult:
        """See `Engine.step`."""
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * rate_factor
        self._take_step()
        skipped = bool(self._optimizer.overflow)
        norm = math.inf if skipped else float(self._engine.get_global_grad_norm())
        return StepResult(norm, skipped)

    @torch.no_grad()
    def loss_sum(self, pack: Pack) -> float:
        """See `Engine.loss_sum`."""
        self._engine.eval()
        loss = float(self._engine(pack.to(self.device)))
        self._engine.train()
        return loss

    def local(self, parameter: nn.Parameter) -> torch.Tensor:
        """See `Engine.local`."""
        shard: torch.Tensor = parameter.ds_tensor if hasattr(parameter, "ds_tensor") else parameter
        return shard.detach()

    def local_masters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """See `Engine.local_masters`."""
        for name in self._parameters:
            yield name, self._shard(name)

    def masters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """See `Engine.masters`."""
        for name in self._parameters:
            self.world.at(f"gathering {name}")
            weight = self._full(name)
            if self.world.is_writer:
                yield name, weight.to("cpu", copy=True)

    def trainable_state(self) -> Iterator[tuple[str, ParameterState]]:
        """See `Engine.trainable_state`."""
        for name, owner in deal({name: shape.numel() for name, shape in self._shapes.items()}, self.world.size):
            self.world.at(f"gathering {name}")
            is_mine = owner == self.world.rank
            tensors = []
            for key in (None, *_MOMENTS):
                full = self._full(name, key) if key is None or self._has_moments else torch.zeros(self._shapes[name])
                tensors += [full.to("cpu", copy=True)] if is_mine else []
            if is_mine:
                yield name, ParameterState(*tensors)

    def peak_memory_bytes(self) -> int:
        """See `Engine.peak_memory_bytes`."""
        return peak_memory_bytes(self.device)

    def _optimizer_of(self, groups: Sequence[Group], options: AdamWOptions) -> torch.optim.Optimizer:
        parameters = [{"params": list(g.parameters.values()), "weight_decay": g.weight_decay} for g in groups]
        if offloads_optimizer(self._settings):
            from deepspeed.ops.adam import DeepSpeedCPUAdam

            if os.environ.get("OMP_NUM_THREADS", "1") == "1":  # as torchrun sets it; more is the user's wish
                torch.set_num_threads(self.world.num_cores)  # DeepSpeed's optimizer uses torch's threads
            return DeepSpeedCPUAdam(parameters, lr=0.0, betas=options.betas, eps=options.epsilon, adamw_mode=True)
        return torch.optim.AdamW(parameters, lr=0.0, betas=options.betas, eps=options.epsilon, fused=True)

    def _take_weights(self, step_module: StepModule, dtype: torch.dtype, settings: dict[str, Any]) -> None:
        """Move and cast the weights, one at a time: no process ever has a whole copy of them beside what it keeps.

        Under ZeRO-3 each one is dealt to the ranks at once. Buffers are moved but keep their type: a rotary
        embedding's `inv_freq` in bfloat16 moves every position.
        """
        for module in reversed(list(step_module.modules())):  # children first
            parameters = [p for p in module.parameters(recurse=False) if not hasattr(p, "ds_id")]
            for parameter in parameters:
                # A copy where it is dealt: DeepSpeed broadcasts into it, and the file's pages would become our own.
                parameter.data = parameter.data.to(self.device, dtype, copy=self._shards_weights)
            if self._shards_weights and parameters:
                self._deepspeed.zero.Init(module=module, config_dict_or_path=settings, dtype=dtype)
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(self.device)

    def _full(self, name: str, key: str | None = None) -> torch.Tensor:
        """Return a master or one of its moments, full shape, float32; all ranks call this together."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        parameter = self._parameters[name]
        full = safe_get_full_optimizer_state(parameter, key) if key else safe_get_full_fp32_param(parameter)
        return full.detach().float().view(self._shapes[name])

    def _shard(self, name: str, key: str | None = None) -> torch.Tensor:
        """Return this rank's shard of a master or of one of its moments, flat, to read or to write."""
        parameter: Any = self._parameters[name]
        if self._shards_weights:
            shard, _ = parameter._z3_optimizer._get_fp32_opt_state_partition(
                parameter, release_swap_buffers=False, optim_state_key=key
            )
        elif parameter._hp_mapping is None:  # all of it lies with other ranks
            return torch.empty(0)
        else:
            shard = parameter._hp_mapping.get_hp_fragment(key)
        flat: torch.Tensor = shard.detach()
        return flat

    def _set_shard(self, name: str, full: torch.Tensor, key: str | None = None) -> None:
        """Take this rank's shard of a full tensor; of one that is mapped from a file, only that much is read."""
        shard = self._shard(name, key)
        if self._shards_weights:  # equal shards, the last ones padded
            start = self.world.rank * shard.numel()
        else:
            mapping = self._parameters[name]._hp_mapping  # type: ignore[attr-defined]
            start = mapping.lp_fragment_address.start if mapping is not None else 0
        mine = full.reshape(-1)[start : start + shard.numel()]
        shard[: mine.numel()].copy_(mine)

    def _carry_over(self) -> None:
        """Let the weights that compute follow the masters, and have moments (of zero) made."""
        if self._shards_weights:
            for name, parameter in self._parameters.items():
                self.local(parameter).copy_(self._shard(name))
            for masters in self._optimizer.fp32_partitioned_groups_flat:
                zeros = {key: torch.zeros_like(masters.data) for key in _MOMENTS}
                self._optimizer.optimizer.state[masters] = {"step": self._step_count(0), **zeros}
            self._has_moments = True
        else:
            self._zero_step()

    def _zero_step(self) -> None:
        """Take one step of zero gradient at rate and decay zero, which does not count."""
        decays = [group["weight_decay"] for group in self._optimizer.param_groups]
        for group in self._optimizer.param_groups:
            group["lr"] = group["weight_decay"] = 0.0
        zero = torch.zeros((), device=self.device)
        for parameter in self._parameters.values():
            zero = zero + parameter.float().sum() * 0.0
        self._engine.set_gradient_accumulation_boundary(True)
        self._engine.backward(zero, scale_wrt_gas=False)
        self._take_step()
        for moments in self._optimizer.optimizer.state.values():
            moments["step"] = self._step_count(0)
        for group, decay in zip(self._optimizer.param_groups, decays, strict=True):
            group["weight_decay"] = decay

    def _step_count(self, number: int) -> Any:
        """Return AdamW's step count as the optimizer keeps it: a tensor, or for DeepSpeed's CPU Adam a number."""
        if offloads_optimizer(self._settings):
            return number
        return torch.tensor(float(number), device=self.device)

    def _take_step(self) -> None:
        self._engine.set_gradient_accumulation_boundary(True)
        self._engine.step()
        if not self._has_moments and not self._optimizer.overflow:
            if hasattr(self._optimizer, "_lazy_init_hp_params_optimizer_state"):
                self._optimizer._hp_optimizer_states_linked = False
                self._optimizer._lazy_init_hp_params_optimizer_state()
            self._has_moments = True


def _with_buckets_that_fit(zero: Mapping[str, Any], num_learning: int) -> dict[str, Any]:
    """Return ZeRO's settings with a bucket that holds no more than all that learns; DeepSpeed allocates two of them."""
    asked = zero.get("reduce_bucket_size")
    return {**zero, "reduce_bucket_size": min(asked, num_learning)} if asked else dict(zero)


def deal(sizes: Mapping[str, int], num_owners: int) -> list[tuple[str, int]]:
    """Deal things to owners so that all get about the same size: the largest first, to who has least (Graham 1969)."""
    heap = [(0, owner) for owner in range(num_owners)]
    dealt = []
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        size, owner = heapq.heappop(heap)
        dealt.append((name, owner))
        heapq.heappush(heap, (size + sizes[name], owner))
    return dealt
