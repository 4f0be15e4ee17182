"""The tables of docs/scaling.md: memory per GPU and the share of communication, on paper, for the real model.

Arithmetic, not measurement. `python -m bench.paper` prints the tables; a test compares the page with them.
"""

import sys
from collections.abc import Iterator

from bench.wire import Weights, formula

# CLIP-ViT-L/14-336 + two-layer projector + Qwen1.5-4B-Chat.
TOTAL, TOWER, PROJECTOR, LANGUAGE_MODEL = 4_263_056_896, 303_507_456, 9_180_160, 3_950_369_280
_UNUSED = 12_598_272  # CLIP's last layer and post_layernorm: frozen always
_LORA_R1 = 40 * (4 * (2560 + 2560) + 3 * (2560 + 6912))  # LoRA parameters on all linear layers per unit of rank
_EMBEDDING = 151_936 * 2560
LEARNING = {
    "projector": PROJECTOR,
    "use_lora (r=128)": PROJECTOR + 128 * _LORA_R1,
    "freeze_vision": PROJECTOR + LANGUAGE_MODEL,
    "full": TOTAL - _UNUSED,
}
_BUCKETS = 2 * 2 * 500_000_000  # overlap_comm fills two reduce buckets of the shipped size, in bfloat16
_LIVE = 2 * 1_000_000_000  # stage3_max_live_parameters

# FLOPs per sample of 620 tokens with one image (model/flops.py), and what an A100 makes of them.
TOKENS = 620
A100_FLOPS, MFU = 312e12, 0.45  # NVIDIA A100 data sheet, bfloat16 dense; an assumption
NVLINK, INFINIBAND = (
    300e9,
    25e9,
)  # bytes/s a GPU each way: A100 data sheet (600 GB/s both ways); HDR 200 Gb/s, one per GPU


def weights_of(train_type: str) -> Weights:
    """Return the numbers of parameters that ZeRO moves (for `full` and `freeze_vision`)."""
    learning = LEARNING[train_type]
    used = TOTAL - _UNUSED
    backward = used - (0 if train_type == "full" else TOWER)
    return Weights(TOTAL, learning, _EMBEDDING, used, backward, 0, 0)


def memory_bytes(engine: str, train_type: str, num_gpus: int) -> float:
    """Return bytes per GPU of weights, gradients, masters and moments in bfloat16, activations not counted.

    plain   2 for every weight; master 4, gradient 4, moments 8 for what learns
    zero1   weights and bfloat16 gradients whole, float32 gradients whole (BF16_Optimizer), masters and moments dealt
    zero2   weights whole; gradients (4, and 4 again during the step), masters and moments dealt; reduce buckets
    zero3   all dealt; the weights gathered at a time
    """
    learns = LEARNING[train_type]
    weights = 2.0 * (TOTAL + (learns - PROJECTOR if "lora" in train_type else 0))
    if engine == "plain":
        return weights + 16 * learns
    if engine == "zero1":
        return weights + 6 * learns + 12 * learns / num_gpus
    buckets = min(_BUCKETS, 4 * learns)
    if engine == "zero2":
        return weights + (8 + 12) * learns / num_gpus + buckets
    if engine == "zero2-offload":
        return weights + buckets
    live = min(_LIVE, weights)
    if engine == "zero3":
        return (weights + (8 + 12) * learns) / num_gpus + live
    assert engine == "zero3-offload"
    return weights / num_gpus + live


def memory_table() -> Iterator[str]:
    """Yield the rows of the memory table, in GB per GPU."""
    columns = [("plain", 1), ("zero2-offload", 1), ("zero1", 4), ("zero2", 4), ("zero3", 4), ("zero2", 8), ("zero3", 8)]
    columns += [("zero2", 64), ("zero3", 64)]
    yield "| `train_type` | " + " | ".join(f"{engine}, {n}" for engine, n in columns) + " |"
    yield "|---|" + "---|" * len(columns)
    for train_type in LEARNING:
        cells = [f"{memory_bytes(engine, train_type, n) / 1e9:.0f}" for engine, n in columns]
        yield f"| {train_type} | " + " | ".join(cells) + " |"


def compute_seconds(train_type: str, samples: float) -> float:
    """Return the seconds an A100 takes for so many samples of 620 tokens and one image.

    A gradient-checkpointed language model is run forward twice: 4 instead of 3 times its forward FLOPs.
    """
    body = 2.0 * (LANGUAGE_MODEL - 2 * _EMBEDDING) * TOKENS
    tower = 2.0 * (TOWER - _UNUSED) * 577
    flops = 4 * body + (3 if train_type == "full" else 1) * tower
    return samples * flops / (A100_FLOPS * MFU)


def share(train_type: str, stage: int, num_gpus: int, global_batch: int, micro_batch: int = 8) -> float:
    """Return communication time over computing time, when nothing overlaps.

    The slowest link decides: NVLink within a node of 8 GPUs, InfiniBand beyond.
    """
    samples = global_batch / num_gpus
    micro_steps = max(1, round(samples / micro_batch))
    sent = sum(formula(stage, weights_of(train_type), num_gpus, micro_steps, 2).values())
    return sent / (NVLINK if num_gpus <= 8 else INFINIBAND) / compute_seconds(train_type, samples)


def share_table() -> Iterator[str]:
    """Yield the rows of the table of communication, in per cent of the computing time (freeze_vision)."""
    numbers = (4, 8, 16, 32, 64, 128, 256, 512)
    yield "| stage, global batch | " + " | ".join(str(n) for n in numbers) + " |"
    yield "|---|" + "---|" * len(numbers)
    for stage in (1, 2, 3):
        for batch in (128, 1024):
            cells = [f"{100 * share('freeze_vision', stage, n, batch):.0f} %" if n <= batch else "-" for n in numbers]
            yield f"| ZeRO-{stage}, {batch} | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    sys.stdout.write("\n".join([*memory_table(), "", *share_table()]) + "\n")
