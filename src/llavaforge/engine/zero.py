"""Several processes: DeepSpeed with ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054), started by torchrun or srun.

DeepSpeed averages gradients over ranks and over `gradient_accumulation_steps`; we want the sum over all, so the scale
is multiplied back here. What DeepSpeed decides in silence (clipping 1.0, bf16 accumulation) is set in `_settings`.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from llavaforge.data.pack import Pack
from llavaforge.engine.base import AdamWOptions, ParameterState, StepResult
from llavaforge.engine.plain import peak_memory_bytes
from llavaforge.errors import UserError
from llavaforge.model.step import StepModule
from llavaforge.model.trainable import Group

_TIMEOUT = timedelta(minutes=30)  # the slowest collective waits for rank 0 to write a checkpoint
_CLIP_NEVER = 1e30  # DeepSpeed reads 0 as "no clipping" but then reports no norm


class ZeroEngine:
    """The engine of one of several processes; see `engine/base.py`."""

    def __init__(self, config_file: Path | None = None) -> None:
        on_gpu = torch.cuda.is_available()
        if not on_gpu:
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        try:
            import deepspeed
        except ImportError:
            raise UserError("Several processes need DeepSpeed: pip install 'llavaforge[deepspeed]'.") from None
        self._deepspeed = deepspeed
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        self.device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
        if on_gpu:
            torch.cuda.set_device(self.device)
        deepspeed.init_distributed("nccl" if on_gpu else "gloo", timeout=_TIMEOUT, verbose=False)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self._zero = _zero_section(config_file)
        self._has_moments = False  # DeepSpeed makes AdamW's moments in the first step

    def prepare(
        self, step_module: StepModule, groups: Sequence[Group], options: AdamWOptions, dtype: torch.dtype
    ) -> None:
        """See `Engine.prepare`."""
        self._rates = [group.learning_rate for group in groups]
        self._parameters = {name: p for group in groups for name, p in group.parameters.items()}
        self._options = options
        originals = {n: p.detach().float().clone() for n, p in self._parameters.items() if p.dtype != dtype}
        buffers = {name: buffer.clone() for name, buffer in step_module.named_buffers()}
        for parameter in step_module.parameters():
            parameter.data = parameter.data.to(dtype)
        optimizer = torch.optim.AdamW(
            [{"params": list(g.parameters.values()), "weight_decay": g.weight_decay} for g in groups],
            lr=0.0,
            betas=options.betas,
            eps=options.epsilon,
        )
        self._engine, self._optimizer, *_ = self._deepspeed.initialize(
            model=step_module, optimizer=optimizer, config=_settings(self._zero, options, dtype)
        )
        for name, buffer in step_module.named_buffers():  # DeepSpeed casts them with the weights
            buffer.data = buffers[name].to(buffer.device)
        self._engine.train()
        if originals:  # masters start from the file's precision, not from the rounded weights
            zeros = {name: torch.zeros_like(weight) for name, weight in originals.items()}
            self.restore({n: ParameterState(w, zeros[n], zeros[n]) for n, w in originals.items()}, 0)

    def restore(self, states: Mapping[str, ParameterState], num_steps: int) -> None:
        """See `Engine.restore`."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        self._make_optimizer_states()
        for name, state in states.items():
            parameter = self._parameters[name]
            safe_set_full_fp32_param(parameter, state.weight.to(self.device))
            safe_set_full_optimizer_state(parameter, state.exp_avg.to(self.device), "exp_avg")
            safe_set_full_optimizer_state(parameter, state.exp_avg_sq.to(self.device), "exp_avg_sq")
            # The low-precision copy that computes is refreshed only by a step: set it here too.
            parameter.data.copy_(state.weight.to(parameter.device, parameter.dtype))
        for moments in self._optimizer.optimizer.state.values():
            moments["step"] = torch.tensor(float(num_steps))

    def micro_step(self, pack: Pack, scale: float) -> float:
        """See `Engine.micro_step`."""
        self._engine.set_gradient_accumulation_boundary(pack.source.is_last_of_step)
        loss = self._engine(pack.to(self.device))
        self._engine.backward(loss * (scale * self.world_size), scale_wrt_gas=False)
        return float(loss.detach())

    def step(self, rate_factor: float) -> StepResult:
        """See `Engine.step`."""
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * rate_factor
        self._engine.set_gradient_accumulation_boundary(True)
        self._engine.step()
        self._link_moments()
        norm = float(self._engine.get_global_grad_norm() or 0.0)
        return StepResult(norm, skipped=not math.isfinite(norm))

    @torch.no_grad()
    def loss_sum(self, pack: Pack) -> float:
        """See `Engine.loss_sum`."""
        self._engine.eval()
        loss = float(self._engine(pack.to(self.device)))
        self._engine.train()
        return loss

    def sum(self, values: Sequence[float]) -> list[float]:
        """See `Engine.sum`."""
        totals = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(totals)
        return [float(total) for total in totals]

    def any(self, flag: bool) -> bool:
        """See `Engine.any`."""
        return self.sum([float(flag)])[0] > 0

    def barrier(self) -> None:
        """See `Engine.barrier`."""
        dist.barrier()

    def masters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """See `Engine.masters`."""
        from deepspeed.utils import safe_get_full_fp32_param

        for name, parameter in self._parameters.items():
            yield name, safe_get_full_fp32_param(parameter).detach().to("cpu", torch.float32, copy=True)

    def trainable_state(self) -> Iterator[tuple[str, ParameterState]]:
        """See `Engine.trainable_state`."""
        from deepspeed.utils import safe_get_full_optimizer_state

        for name, weight in self.masters():
            moments = [torch.zeros_like(weight), torch.zeros_like(weight)]
            if self._has_moments:
                full = (safe_get_full_optimizer_state(self._parameters[name], key) for key in ("exp_avg", "exp_avg_sq"))
                moments = [moment.detach().to("cpu", torch.float32, copy=True) for moment in full]
            yield name, ParameterState(weight, *moments)

    def peak_memory_bytes(self) -> int:
        """See `Engine.peak_memory_bytes`."""
        return peak_memory_bytes(self.device)

    def close(self) -> None:
        """See `Engine.close`."""
        dist.barrier()
        dist.destroy_process_group()

    def _link_moments(self) -> None:
        """Let parameters find their moments after the first step.

        DeepSpeed 0.19.8 links those of all groups once the first group has stepped, when the others have none yet.
        """
        if not self._has_moments:
            self._optimizer._hp_optimizer_states_linked = False
            self._optimizer._lazy_init_hp_params_optimizer_state()
            self._has_moments = True

    def _make_optimizer_states(self) -> None:
        """Take one step of zero gradient at rate and decay zero, so that the moments exist and can be set."""
        decays = [group["weight_decay"] for group in self._optimizer.param_groups]
        for group in self._optimizer.param_groups:
            group["lr"] = group["weight_decay"] = 0.0
        zero = sum((parameter.float().sum() * 0.0 for parameter in self._parameters.values()), torch.zeros(()))
        self._engine.set_gradient_accumulation_boundary(True)
        self._engine.backward(zero.to(self.device), scale_wrt_gas=False)
        self._engine.step()
        self._link_moments()
        for group, decay in zip(self._optimizer.param_groups, decays, strict=True):
            group["weight_decay"] = decay


def _zero_section(config_file: Path | None) -> dict[str, Any]:
    if config_file is None:
        return {"stage": 2}
    if not config_file.is_file():
        raise UserError(f"{config_file}: no such file (deepspeed). Give a DeepSpeed JSON file.")
    try:
        section = json.loads(config_file.read_text()).get("zero_optimization", {"stage": 2})
    except (ValueError, AttributeError) as error:
        raise UserError(f"{config_file}: not a DeepSpeed JSON file ({error}).") from None
    if section.get("stage") not in (1, 2):
        raise UserError(
            f"{config_file}: zero_optimization.stage {section.get('stage')!r} is not supported; use 1 or 2."
        )
    return dict(section)


def _settings(zero: dict[str, Any], options: AdamWOptions, dtype: torch.dtype) -> dict[str, Any]:
    return {
        # Batch sizes are ours to count; DeepSpeed wants some.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": options.max_grad_norm or _CLIP_NEVER,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": 2**31,
    }
