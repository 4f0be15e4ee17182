"""The page on scaling holds what the arithmetic gives, and the arithmetic is that of the real model."""

from pathlib import Path

import pytest
from bench.scaling.paper import (
    LINKS,
    TRAIN_TYPES,
    activations,
    communication_s,
    compute_s,
    memory,
    memory_table,
    pays_table,
    pays_up_to,
    real_model,
    share,
    share_table,
)
from bench.scaling.wire import Weights

PAGE = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text()
TOTAL, TOWER, PROJECTOR, LANGUAGE_MODEL = 4_263_056_896, 303_507_456, 9_180_160, 3_950_369_280
HDR = LINKS["4 HDR adapters"]


@pytest.mark.parametrize("table", [memory_table, share_table, pays_table], ids=lambda table: table.__name__)
def test_the_pages_tables_are_the_computed_ones(table: object) -> None:
    assert "\n".join(table()) in PAGE  # type: ignore[operator]


def test_the_real_models_counts() -> None:
    counts = {train_type: real_model(train_type)[0] for train_type in TRAIN_TYPES}
    assert counts["full"].total == counts["projector"].total == TOTAL
    assert counts["projector"].learning == PROJECTOR
    assert counts["freeze_vision"].learning == PROJECTOR + LANGUAGE_MODEL
    unused = (
        4 * (1024**2 + 1024) + 2 * 4 * 1024**2 + 5 * 1024 + 4 * 1024 + 2 * 1024
    )  # CLIP's last layer and its last norm
    assert counts["full"].learning == TOTAL - unused
    assert counts["use_lora"].learning == PROJECTOR + 128 * 40 * (4 * 5120 + 3 * 9472)
    assert counts["use_lora"].total == TOTAL + counts["use_lora"].learning - PROJECTOR


def test_memory_by_hand() -> None:
    billion = 10**9
    counts = Weights(
        4 * billion, 3 * billion, largest=billion * 2 // 5, forward=0, backward=0, recomputed=0, persistent=0
    )
    peaks = {
        (engine, n): memory(engine, counts, n).peak / 1e9 for engine in ("zero1", "zero2", "zero3") for n in (2, 30)
    }
    assert memory("plain", counts, 1).peak / 1e9 == pytest.approx(8 + 16 * 3 + 0.8)
    assert peaks["zero1", 2] == pytest.approx(8 + 12 * 3 + 6 * 3)
    assert peaks["zero2", 2] == pytest.approx(8 + 8 * 3 + 2 * 3)  # AdamW's temporary tensor is more than the buckets
    assert peaks["zero2", 30] == pytest.approx(8 + 16 * 0.1 + 3 + 0.8)  # two buckets and a copy of 10^9 bytes each
    assert peaks["zero3", 2] == pytest.approx(4 + 8 * 3 + 4)
    assert peaks["zero3", 30] == pytest.approx((8 + 16 * 3) / 30 + 2 + 0.8)
    offloaded = memory("zero2-offload", counts, 2), memory("zero3-offload", counts, 2)
    assert [one.host / 1e9 for one in offloaded] == pytest.approx([9 * 3, 10 * 3])
    assert [one.peak / 1e9 for one in offloaded] == pytest.approx([8 + 2 * 3 + 3 + 2 * 0.8, 4 + 2 + 0.8])
    with pytest.raises(ValueError, match="zero4"):
        memory("zero4", counts, 1)


def test_the_pages_figures_in_prose() -> None:
    assert f"by estimate {activations('freeze_vision') / 1e9:.0f} GB" in PAGE
    assert f"({activations('full') / 1e9:.0f} GB when the tower" in PAGE
    assert f"needs {memory('zero2-offload', real_model('full')[0], 1).host / 1e9:.0f} GB there" in PAGE
    everywhere = 40 * 32 * (4 * 5120 + 3 * 9472) + PROJECTOR
    attention_only = 40 * 32 * 4 * 5120 + PROJECTOR
    assert f"{everywhere * 12 / 1e6:.0f} MB (71.8 M parameters)" in PAGE
    assert f"alone: {attention_only * 12 / 1e6:.0f} MB" in PAGE


def test_seconds_by_hand() -> None:
    # Within a node: 8 GPUs, one micro-step of 8 samples; ZeRO-2 sends 6 bytes for what learns, less an eighth.
    learning = PROJECTOR + LANGUAGE_MODEL
    assert communication_s("freeze_vision", 2, 64, 8, HDR) == pytest.approx(7 / 8 * 6 * learning / 300e9)
    # Two nodes and a slower border, twice the samples: another all-reduce.
    assert communication_s("freeze_vision", 2, 256, 16, HDR) == pytest.approx(15 / 16 * 10 * learning / 100e9)
    flops = 6 * (LANGUAGE_MODEL - 151_936 * 2560) * 620  # all but embeddings; the head too, as if on every token
    assert compute_s("freeze_vision", 8, 8) == pytest.approx(flops / (0.45 * 312e12), rel=0.15)


def test_what_the_page_concludes() -> None:
    for stage in (1, 2, 3):
        assert share("freeze_vision", stage, 1024, 8, HDR) < 0.1
        assert share("freeze_vision", stage, 128, 64, HDR) > 0.5
        assert pays_up_to("freeze_vision", stage, 128, HDR) == 32
        assert pays_up_to("freeze_vision", stage, 1024, HDR) == 256
    assert share("freeze_vision", 1, 1024, 64, HDR) < share("freeze_vision", 2, 1024, 64, HDR)
    for train_type in ("projector", "use_lora"):
        assert pays_up_to(train_type, 2, 128, HDR) == 128
        assert pays_up_to(train_type, 3, 128, HDR) < 128
