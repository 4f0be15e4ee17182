"""AdamW's moments in 8 bits and back, so that a checkpoint in float32 gives the very state that was saved.

torchao scales each block of 256 numbers by its largest and keeps the nearest of 256 values (Dettmers et al. 2022,
arXiv:2110.02861). Done again on numbers that came out of it, that may give another scale: the lowest value is -0.993,
not -1, and there is a smallest scale. So the scale is sought with which the numbers come out as they went in.
"""

from typing import Any

import torch

_LEAST_SCALE = 1e-12  # torchao's (optim/quant_utils.py)
_STEPS = 4  # to the left and right of a scale, in units of the last place


def to_float(moment: torch.Tensor) -> torch.Tensor:
    """Return a moment as an optimizer keeps it in float32."""
    whole: torch.Tensor = moment.dequantize() if is_in_8_bits(moment) else moment
    return whole


def is_in_8_bits(moment: torch.Tensor) -> bool:
    """Say whether a moment is kept in 8 bits; torchao keeps small tensors whole."""
    return hasattr(moment, "codes")


def fill(moment: Any, saved: torch.Tensor) -> None:
    """Set a moment of the optimizer to what `to_float` gave, exactly."""
    if not is_in_8_bits(moment):
        moment.copy_(saved)
        return
    from torchao.optim.quant_utils import (  # type: ignore[import-untyped]
        dequant_with_qmap,
        quantize_8bit_with_qmap,
    )

    blocks = saved.to(moment.codes.device, torch.float32).reshape(len(moment.scale), -1)
    scales = _scales(blocks, moment.qmap)
    is_found = torch.zeros(len(blocks), dtype=torch.bool, device=blocks.device)
    codes = moment.codes.view(len(blocks), -1)
    for scale in scales:
        tried = quantize_8bit_with_qmap(blocks / scale[:, None], moment.qmap)
        is_exact = (dequant_with_qmap(tried, moment.qmap, scale) == blocks).all(1) & ~is_found
        if scale is scales[0]:  # for numbers that never were in 8 bits
            is_exact |= True
        codes.copy_(torch.where(is_exact[:, None], tried, codes))
        moment.scale.copy_(torch.where(is_exact, scale, moment.scale))
        is_found |= (dequant_with_qmap(codes, moment.qmap, moment.scale) == blocks).all(1)
        if is_found.all():
            return


def _scales(blocks: torch.Tensor, qmap: torch.Tensor) -> list[torch.Tensor]:
    """Return the scales that the blocks may have had, the likeliest first."""
    largest = blocks.abs().amax(1).clip(_LEAST_SCALE)
    found = [largest]
    for value in (qmap[0].abs(), qmap[-2]) if qmap[0] < 0 else (qmap[-2],):
        scale = (largest / value).clip(_LEAST_SCALE)
        found.append(scale)
        for target in (torch.inf, -torch.inf):
            near = scale
            for _ in range(_STEPS):
                near = torch.nextafter(near, torch.full_like(near, target))
                found.append(near)
    return [*found, torch.full_like(largest, _LEAST_SCALE)]
