"""Our LoRA layer computes what peft's does."""

import pytest
import torch
from peft.tuners.lora import Linear

from llavaforge.machine.random_model import TINY, random_model
from llavaforge.model.lora import LoraLinear, LoraOptions, add_lora, is_lora


def outputs_and_gradients(kind: type, dropout: float) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Of the language model's layers, with LoRA matrices that are not zero."""
    model = random_model(TINY, torch.device("cpu"), torch.float32)
    add_lora(model, LoraOptions(4, 16, dropout, ("q_proj", "down_proj")), seed=1)
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_lora(name))
        if is_lora(name):
            torch.nn.init.normal_(parameter, std=0.1)
    layers = [module for module in model.modules() if isinstance(module, LoraLinear)]
    assert len(layers) == 2 * TINY.layers
    for layer in layers:
        layer.__class__ = kind
    output = model.model.language_model(inputs_embeds=torch.randn(2, 7, TINY.width)).last_hidden_state
    output.square().sum().backward()
    return output, [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_output_and_gradients_are_pefts(dropout: float) -> None:
    ours, our_gradients = outputs_and_gradients(LoraLinear, dropout)
    theirs, their_gradients = outputs_and_gradients(Linear, dropout)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert len(our_gradients) == 4 * TINY.layers
    for mine, other in zip(our_gradients, their_gradients, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()))
