"""Packed attention isolates samples and honours sliding windows."""

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from llavaforge.model.attention import packed_attention


@pytest.mark.parametrize("window", [None, 3, 100])
@pytest.mark.parametrize("num_kv_heads", [4, 2])
def test_equals_masked_attention_over_each_sample(window: int | None, num_kv_heads: int) -> None:
    torch.manual_seed(0)
    lengths = (5, 1, 9)
    query = torch.randn(1, 4, 15, 8)
    key, value = torch.randn(1, num_kv_heads, 15, 8), torch.randn(1, num_kv_heads, 15, 8)
    borders = torch.tensor([0, 5, 6, 15], dtype=torch.int32)
    found, _ = packed_attention(
        torch.nn.Identity(), query, key, value, None, lengths=lengths, cu_seqlens=borders, sliding_window=window
    )
    place = torch.arange(15)
    sample = torch.searchsorted(borders, place, right=True)
    distance = place[:, None] - place[None, :]
    allowed = (sample[:, None] == sample[None, :]) & (distance >= 0) & (distance < (window or 1000))
    repeats = 4 // num_kv_heads
    scores = query @ key.repeat_interleave(repeats, 1).transpose(2, 3) / 8**0.5
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
    torch.testing.assert_close(found, (weights @ value.repeat_interleave(repeats, 1)).transpose(1, 2))


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
        lengths=(11, 7),
        cu_seqlens=torch.tensor([0, 11, 18], dtype=torch.int32),
    ).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
