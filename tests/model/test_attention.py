"""Packed attention isolates samples and honours sliding windows; its blocks on a CPU are exact."""

import pytest
import torch
import varlen_reference
from torch.nn.functional import scaled_dot_product_attention
from transformers import Qwen2Config, Qwen2ForCausalLM

from llavaforge.errors import UserError
from llavaforge.model import attention
from llavaforge.model.attention import Borders, packed_attention
from llavaforge.model.block_attention import BLOCK, MAX_LENGTH, block_attention

LENGTHS = (5, 1, 140, MAX_LENGTH + 6)


def masked_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None = None
) -> torch.Tensor:
    """The definition: all scores of the pack, and a mask for what a token must not see."""
    borders = torch.tensor(LENGTHS).cumsum(0)
    place = torch.arange(sum(LENGTHS))
    sample = torch.searchsorted(borders, place, right=True)
    distance = place[:, None] - place[None, :]
    allowed = (sample[:, None] == sample[None, :]) & (distance >= 0) & (distance < (window or len(place)))
    repeats = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(repeats, 1).transpose(2, 3) / query.shape[-1] ** 0.5
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
    return (weights @ value.repeat_interleave(repeats, 1)).transpose(1, 2)


@pytest.mark.parametrize("window", [None, 3, 2000])
@pytest.mark.parametrize("num_kv_heads", [4, 2])
def test_equals_masked_attention_over_each_sample(window: int | None, num_kv_heads: int) -> None:
    """One block, several blocks, and a sample too long for them; values and gradients."""
    torch.manual_seed(0)
    inputs = [torch.randn(1, heads, sum(LENGTHS), 8, requires_grad=True) for heads in (4, num_kv_heads, num_kv_heads)]
    borders = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    found, _ = packed_attention(
        torch.nn.Identity(), *inputs, None, borders=Borders(LENGTHS, borders, max(LENGTHS)), sliding_window=window
    )
    expected = masked_attention(*inputs, window)
    torch.testing.assert_close(found, expected)
    direction = torch.randn_like(expected)
    for ours, theirs in zip(
        torch.autograd.grad(found, inputs, direction), torch.autograd.grad(expected, inputs, direction), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [None, 3, 2000])
@pytest.mark.parametrize("num_kv_heads", [4, 2])
def test_the_branch_for_cuda_equals_masked_attention(
    window: int | None, num_kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU, through torch's own op; `varlen_reference` asserts what the kernel asks for."""
    varlen_reference.register()
    monkeypatch.setattr(attention, "has_varlen", lambda *_: True)
    torch.manual_seed(0)
    inputs = [torch.randn(1, heads, sum(LENGTHS), 16).bfloat16() for heads in (4, num_kv_heads, num_kv_heads)]
    exact = [tensor.float().requires_grad_() for tensor in inputs]
    inputs = [tensor.requires_grad_() for tensor in inputs]
    borders = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    found, _ = packed_attention(
        torch.nn.Identity(), *inputs, None, borders=Borders(LENGTHS, borders, max(LENGTHS)), sliding_window=window
    )
    expected = masked_attention(*exact, window)
    torch.testing.assert_close(found.float(), expected, rtol=1e-2, atol=1e-2)
    direction = torch.randn_like(expected).bfloat16()
    ours = torch.autograd.grad(found, inputs, direction)
    theirs = torch.autograd.grad(expected, exact, direction.float())
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.float(), other, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("asked", [{"softcap": 50.0}, {"s_aux": torch.zeros(4)}, {"is_causal": False}])
def test_what_is_not_computed_is_refused(asked: dict[str, object]) -> None:
    inputs = [torch.randn(1, 4, 6, 8) for _ in range(3)]
    borders = torch.tensor([0, 6]).int()
    harmless = {"position_ids": torch.arange(6), "softcap": None, "is_causal": True}
    packed_attention(torch.nn.Identity(), *inputs, None, borders=Borders((6,), borders, 6), **harmless)
    with pytest.raises(UserError, match=f"asks its attention for `{next(iter(asked))}"):
        packed_attention(torch.nn.Identity(), *inputs, None, borders=Borders((6,), borders, 6), **asked)


def test_blocks_in_bfloat16_are_as_exact_as_eager_attention() -> None:
    torch.manual_seed(0)
    exact = [torch.randn(4, 400, 64, requires_grad=True) for _ in range(3)]
    rounded = [it.detach().bfloat16().requires_grad_() for it in exact]
    direction = torch.randn(4, 400, 64)

    def eager(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        later = torch.full((400, 400), -torch.inf).triu(1)
        scores = query @ key.transpose(1, 2) * 0.125 + later.to(query.dtype)
        return scores.softmax(-1, dtype=torch.float32).to(query.dtype) @ value

    expected = torch.autograd.grad(eager(*exact), exact, direction)
    plain = torch.autograd.grad(eager(*rounded), rounded, direction.bfloat16())
    blocks = torch.autograd.grad(block_attention(*rounded, 0.125), rounded, direction.bfloat16())
    for true, ours, theirs in zip(expected, blocks, plain, strict=True):
        assert (ours.float() - true).norm() < 1.25 * (theirs.float() - true).norm()


def test_without_a_gradient_nothing_is_kept() -> None:
    with torch.no_grad():
        output = block_attention(*(torch.randn(2, 8, 4, requires_grad=True) for _ in range(3)), 0.5)
    assert output.grad_fn is None


def test_sliding_window_of_a_stock_model_is_the_same_packed_and_unpacked() -> None:
    from transformers import AttentionInterface

    from llavaforge.model.attention import PACKED

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, use_sliding_window=True, sliding_window=4, max_window_layers=1, initializer_range=0.5,
        pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).eval()
    one, other = torch.randint(0, 50, (1, 11)), torch.randint(0, 50, (1, 7))
    expected = torch.cat([model(one).logits, model(other).logits], dim=1)
    AttentionInterface.register(PACKED, packed_attention)
    model.set_attn_implementation(PACKED)
    found = model(
        torch.cat([one, other], dim=1),
        position_ids=torch.cat([torch.arange(11), torch.arange(7)])[None],
        use_cache=False,
        borders=Borders((11, 7), torch.tensor([0, 11, 18], dtype=torch.int32), 11),
    ).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_key_heads", [1, 2, 4])
@pytest.mark.parametrize("length", [1, BLOCK - 1, BLOCK, 2 * BLOCK + 3])
def test_blocks_compute_in_float32_what_pytorch_s_kernel_does(length: int, num_key_heads: int) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(heads, length, 16, requires_grad=True) for heads in (4, num_key_heads, num_key_heads)]
    direction = torch.randn(4, length, 16)
    expected = scaled_dot_product_attention(*(x[None] for x in inputs), is_causal=True, scale=0.3, enable_gqa=True)[0]
    found = block_attention(*inputs, 0.3)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    gradients = (torch.autograd.grad(output, inputs, direction) for output in (found, expected))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
