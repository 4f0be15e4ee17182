"""A micro-step of the published sizes as a GPU would run it, on `meta`, where tensors have shapes and no numbers.

Code that reads a number off the device, or asks how many of something there are, fails there. So does a copy to the
host. Legend of the packs: `model/step.py`.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface

from llavaforge.engine.base import AdamWOptions
from llavaforge.engine.plain import PlainEngine
from llavaforge.machine.random_model import PUBLISHED, preprocessing, random_model, random_packs, train_options
from llavaforge.model.activations import CHUNK
from llavaforge.model.step import StepModule
from llavaforge.model.trainable import parameter_groups
from llavaforge.processes.world import World
from train_tools import TRAIN_TYPES

META = torch.device("meta")
SIZE = replace(PUBLISHED, layers=2, tower_layers=3)  # all layers are alike
PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm", "convolution", "convolution_backward"}


class Watch(TorchDispatchMode):
    """Lists matrix products of float32, and waits of the host: copies that are not asynchronous."""

    def __init__(self) -> None:
        super().__init__()
        self.num_products = 0
        self.float32_products: list[str] = []
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        inputs, name = tensors((args, kwargs)), func.overloadpacket.__name__
        if name in PRODUCTS:
            self.num_products += 1
            if any(tensor.dtype == torch.float32 for tensor in inputs):
                self.float32_products.append(f"{name} of {[tuple(tensor.shape) for tensor in inputs]}")
        devices = {tensor.device for tensor in (*inputs, *tensors(output))}
        if len(devices) > 1 and not kwargs.get("non_blocking"):
            self.waits.append(f"{name} of {[tuple(tensor.shape) for tensor in inputs]}")
        return output


class NewTensors(TorchFunctionMode):
    """Lists tensors made on the device of the host's numbers: copies that wait, which `Watch` does not see."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.as_tensor) and output.device == META:
            self.found.append(args)
        return output


def tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def fused_attention(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **_: Any
) -> tuple[torch.Tensor, None]:
    """What SDPA chooses on a GPU; on `meta` it computes step by step, and in float32."""
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0].transpose(1, 2), None


def engine_of(train_type: str, dtype: torch.dtype = torch.bfloat16, **options: Any) -> PlainEngine:
    config = train_options(train_type, **options)
    model = random_model(SIZE, META, dtype)
    groups = parameter_groups(model, config)
    engine = PlainEngine(World(device=META))
    module = StepModule(model, preprocessing(SIZE), config.recompute_every)
    engine.prepare(module, groups, AdamWOptions.of(config), dtype)
    AttentionInterface.register("fused", fused_attention)
    model.set_attn_implementation({"vision_config": "fused"})
    return engine


def micro_steps(engine: PlainEngine) -> tuple[Watch, NewTensors]:
    """Run a pack with images and one without, after another one, which may fill caches."""
    first, second = random_packs(SIZE, 2, 16, (50, 300))
    assert second.num_images == 16 and second.num_supervised > CHUNK
    nothing = torch.zeros(0, dtype=torch.uint8)
    third = replace(second, pixels_ICHW=nothing, image_positions_M=nothing.long())
    engine.micro_step(first, 1.0)
    with Watch() as watch, NewTensors() as made:
        for pack in (second, third):
            engine.micro_step(pack, 1.0)
    return watch, made


@pytest.mark.parametrize("train_type", TRAIN_TYPES)
@pytest.mark.parametrize("recomputes", [False, True])
def test_a_micro_step_in_bfloat16_never_waits_and_multiplies_no_float32(train_type: str, recomputes: bool) -> None:
    watch, made = micro_steps(engine_of(train_type, gradient_checkpointing=recomputes))
    assert watch.num_products > 60
    assert watch.float32_products == []
    assert watch.waits == made.found == []


def test_a_micro_step_in_float32_never_waits() -> None:
    """Its attention is another: FlashAttention's kernel takes half precision only."""
    watch, made = micro_steps(engine_of("full", torch.float32))
    assert len(watch.float32_products) > 80
    assert watch.waits == made.found == []


def test_what_is_looked_for_would_be_found() -> None:
    host, device = torch.ones(4, 4), torch.ones(4, 4, device=META)
    with Watch() as watch, NewTensors() as made:
        device @ device
        host.to(META)
        host.to(META, non_blocking=True)
        torch.tensor([1.0], device=META)
        device.bfloat16() @ device.bfloat16()
        for read in (device.sum().item, device.nonzero, device.cpu, lambda: device[device > 0]):
            with pytest.raises((RuntimeError, NotImplementedError)):
                read()
    assert (watch.num_products, watch.float32_products) == (2, ["mm of [(4, 4), (4, 4)]"])
    assert watch.waits == ["_to_copy of [(4, 4)]"] and len(made.found) == 1
