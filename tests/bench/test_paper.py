"""The page on scaling holds what the arithmetic gives."""

from pathlib import Path

import pytest
from bench.paper import LEARNING, PROJECTOR, TOTAL, memory_bytes, memory_table, share, share_table

PAGE = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text()


def test_the_pages_tables_are_the_computed_ones() -> None:
    for table in (memory_table(), share_table()):
        assert "\n".join(table) in PAGE


def test_memory_by_hand() -> None:
    learning = 3_950_369_280 + PROJECTOR
    assert memory_bytes("plain", "freeze_vision", 1) == 2 * TOTAL + 16 * learning
    assert memory_bytes("zero3", "freeze_vision", 8) == pytest.approx((2 * TOTAL + 20 * learning) / 8 + 2e9)
    assert LEARNING["use_lora (r=128)"] == 4 * 62_586_880 + PROJECTOR


def test_the_sizes_of_lora_checkpoints_on_the_page() -> None:
    everywhere = 40 * 32 * (4 * 5120 + 3 * 9472) + PROJECTOR
    attention_only = 40 * 32 * 4 * 5120 + PROJECTOR
    assert f"{everywhere * 12 / 1e6:.0f} MB (71.8 M parameters)" in PAGE
    assert f"alone: {attention_only * 12 / 1e6:.0f} MB" in PAGE
    assert attention_only * 12 < 600e6


def test_communication_grows_with_gpus_and_shrinks_with_the_batch() -> None:
    assert share("freeze_vision", 2, 64, 128) > share("freeze_vision", 2, 8, 128)
    assert share("freeze_vision", 1, 64, 1024) < share("freeze_vision", 2, 64, 1024)
