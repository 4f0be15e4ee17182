"""One process, plain PyTorch: a CPU or one GPU.

What learns has a float32 master; with a lower compute dtype each micro-step's gradient is added to the master's in
float32 as soon as it exists, and freed, so that accumulation loses nothing and memory holds one gradient.
"""

import math
import resource
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llavaforge.data.load.pack import Pack
from llavaforge.engine.base import AdamWOptions, ParameterState, StepResult
from llavaforge.engine.moments import fill, to_float
from llavaforge.model.step import StepModule
from llavaforge.model.trainable import Group, cast_parameters
from llavaforge.processes.world import World


class PlainEngine:
    """The engine of a single process; see `engine/base.py`."""

    name = "plain"
    has_whole_weights = True

    def __init__(self, world: World) -> None:
        self.world, self.device = world, world.device
        self._masters: dict[str, nn.Parameter] = {}
        self._parameters: dict[str, nn.Parameter] = {}

    def prepare(
        self, step_module: StepModule, groups: Sequence[Group], options: AdamWOptions, dtype: torch.dtype
    ) -> None:
        """See `Engine.prepare`."""
        for group in groups:
            self._parameters |= group.parameters
            self._masters |= {name: self._master(p, dtype) for name, p in group.parameters.items()}
        cast_parameters(step_module, dtype)
        self._module = step_module.to(self.device)
        self._module.train()
        self._clip = options.max_grad_norm
        self._rates = [group.learning_rate for group in groups]
        parameters: list[dict[str, Any]] = [
            {"params": [self._masters[name] for name in group.parameters], "weight_decay": group.weight_decay}
            for group in groups
        ]
        numbers: dict[str, Any] = dict(lr=0.0, betas=options.betas, eps=options.epsilon)
        if options.moments_in_8_bits:
            warnings.filterwarnings("ignore", "OptimState8bit does not implement _stable_hash", UserWarning)
            from torchao.optim import AdamW8bit  # type: ignore[import-untyped]

            self._optimizer: torch.optim.Optimizer = AdamW8bit(parameters, **numbers)
        else:
            self._optimizer = torch.optim.AdamW(parameters, **numbers, fused=True)
        self._moments_in_8_bits = options.moments_in_8_bits

    def restore(self, states: Mapping[str, ParameterState], num_steps: int) -> None:
        """See `Engine.restore`."""
        for name, state in states.items():
            master = self._masters[name]
            master.data.copy_(state.weight)
            self._optimizer.state[master] = {
                "step": torch.tensor(float(num_steps), device="cpu" if self._moments_in_8_bits else self.device),
                "exp_avg": self._moment(master, state.exp_avg, signed=True),
                "exp_avg_sq": self._moment(master, state.exp_avg_sq, signed=False),
            }
        self._publish_masters()

    def micro_step(self, pack: Pack, scale: float) -> torch.Tensor:
        """See `Engine.micro_step`."""
        loss: torch.Tensor = self._module(pack.to(self.device))
        (loss * scale).backward()
        return loss.detach()

    def step(self, rate_factor: float) -> StepResult:
        """See `Engine.step`."""
        masters = list(self._masters.values())
        bound = self._clip or math.inf
        norm = float(nn.utils.clip_grad_norm_(masters, bound))
        if not math.isfinite(norm):
            self._optimizer.zero_grad()
            return StepResult(norm, skipped=True)
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            if self._moments_in_8_bits:
                group["lr"].fill_(rate * rate_factor)
            else:
                group["lr"] = rate * rate_factor
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._publish_masters()
        return StepResult(norm, skipped=False)

    @torch.no_grad()
    def loss_sum(self, pack: Pack) -> float:
        """See `Engine.loss_sum`."""
        self._module.eval()
        loss = float(self._module(pack.to(self.device)))
        self._module.train()
        return loss

    def local(self, parameter: nn.Parameter) -> torch.Tensor:
        """See `Engine.local`."""
        return parameter.detach()

    def local_masters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """See `Engine.local_masters`."""
        for name, master in self._masters.items():
            yield name, master.detach()

    def masters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """See `Engine.masters`."""
        for name, master in self._masters.items():
            yield name, master.detach().to("cpu", copy=True)

    def trainable_state(self) -> Iterator[tuple[str, ParameterState]]:
        """See `Engine.trainable_state`."""
        for name, master in self._masters.items():
            moments = self._optimizer.state.get(master, {})
            zeros = torch.zeros_like(master, device="cpu")
            state = (master, moments.get("exp_avg", zeros), moments.get("exp_avg_sq", zeros))
            yield name, ParameterState(*(to_float(tensor.detach()).to("cpu", copy=True) for tensor in state))

    def peak_memory_bytes(self) -> int:
        """See `Engine.peak_memory_bytes`."""
        return peak_memory_bytes(self.device)

    def _master(self, parameter: nn.Parameter, dtype: torch.dtype) -> nn.Parameter:
        if dtype == torch.float32:
            parameter.data = parameter.data.float().to(self.device)
            return parameter
        # Taken before the cast: a float32 base model keeps its full precision in the master.
        master = nn.Parameter(parameter.detach().float().to(self.device, copy=True))

        def collect(computed: torch.Tensor) -> None:
            assert computed.grad is not None
            master.grad = computed.grad.float() if master.grad is None else master.grad.add_(computed.grad)
            computed.grad = None

        parameter.register_post_accumulate_grad_hook(collect)
        return master

    def _moment(self, master: nn.Parameter, saved: torch.Tensor, signed: bool) -> torch.Tensor:
        """Return a saved moment as the optimizer keeps it."""
        if self._moments_in_8_bits:
            buffer: torch.Tensor = self._optimizer._new_buffer(master, signed)  # type: ignore[attr-defined]
            fill(buffer, saved)
            return buffer
        return saved.to(self.device, copy=True)  # it may be mapped from a file that is going to be removed

    @torch.no_grad()
    def _publish_masters(self) -> None:
        for name, parameter in self._parameters.items():
            if parameter is not self._masters[name]:
                parameter.copy_(self._masters[name])


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak of the device's allocator, or of this process's resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.is_file():  # Linux passes ru_maxrss on through exec: it may be the peak of the process that started us
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(peak.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, else KiB (getrusage(2))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
