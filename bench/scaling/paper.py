"""The tables of docs/scaling.md: memory per GPU and the share of communication, on paper, for the real model.

Arithmetic, not measurement; `python -m bench.scaling.paper` prints the tables; for other networks and batches change
the constants below. GB are 10^9 bytes. What each engine holds is read from `engine/plain.py` and from DeepSpeed 0.19.8
(`runtime/bf16_optimizer.py`, `runtime/engine.py`, `runtime/zero/stage_1_and_2.py`, `stage3.py`) with the shipped files,
in bfloat16.
"""

import functools
import math
import sys
from collections.abc import Iterator

import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration

from bench.parts import text_config, vision_config
from bench.scaling.wire import MAX_LIVE, Weights, formula
from bench.scenarios import REAL, SIZES
from llavaforge.config.schema import TrainConfig
from llavaforge.model.flops import FlopCounter
from llavaforge.model.loss import CHUNK
from llavaforge.model.trainable import parameter_groups

TRAIN_TYPES = ("projector", "use_lora", "freeze_vision", "full")  # LoRA: r = 128 on all linear layers, as the recipe
ENGINES = ("zero1", "zero2", "zero3", "zero2-offload", "zero3-offload")
NUM_GPUS = (4, 8, 16, 32, 64, 128, 256, 512)
_BUCKET = 500_000_000  # `reduce_bucket_size` of the shipped ZeRO-2 files

# A sample with one image: 576 image tokens and some text.
TOKENS, SUPERVISED, MICRO_BATCH = 620, 40, 8
# Published: NVIDIA A100 data sheet (312 TFLOP/s bfloat16 dense; NVLink 600 GB/s, both ways together). Assumed: MFU.
PEAK_FLOPS, MFU, NVLINK, GPUS_PER_NODE = 312e12, 0.45, 300e9, 8
# Bytes per second that a node of 8 GPUs sends: adapters of 200 Gb/s (NVIDIA ConnectX-6 HDR data sheet); IEEE 802.3ba.
LINKS = {"8 HDR adapters": 8 * 25e9, "4 HDR adapters": 4 * 25e9, "100 Gb/s Ethernet": 12.5e9}
TABLE_LINK = "4 HDR adapters"
_PAYS = 1.5  # times as fast on twice as many GPUs


def memory(engine: str, weights: Weights, num_gpus: int) -> float:
    """Return the bytes that a process holds on its GPU at the worst moment, activations not counted.

    plain: weights 2 bytes; what learns: master 4, gradient 4, moments 8.
    zero1: of what learns, every process keeps the gradient twice (bfloat16 of the micro-step, float32 of the step);
        before the reduction, when the activations are gone, all of it is copied once more in float32 and once in
        bfloat16. Masters and moments dealt.
    zero2: gradients dealt as well; two buckets of bfloat16 whatever the model's size (`overlap_comm`), a copy of one
        to send, the largest gradient. Later AdamW makes one temporary tensor as large as a moment.
    zero3: weights dealt as well, frozen ones too; up to `MAX_LIVE` of them are gathered.
    offload: masters and moments on the host. ZeRO-2 accumulates its share of the gradient on the GPU.
    """
    learning, dealt = weights.learning, weights.learning / num_gpus
    whole, largest = 2.0 * weights.total, 2.0 * weights.largest
    buckets = 2.0 * (2 * _BUCKET + min(_BUCKET, learning)) + largest
    gathered = 2.0 * min(MAX_LIVE, weights.total) + largest
    return {
        "plain": whole + 16 * learning + largest,
        "zero1": whole + 6 * learning + 12 * dealt + 6 * learning,
        "zero2": whole + 16 * dealt + max(buckets, 4 * dealt),
        "zero3": whole / num_gpus + 16 * dealt + max(gathered, 4 * min(1e9, dealt)),
        "zero2-offload": whole + 4 * dealt + buckets + largest,
        "zero3-offload": whole / num_gpus + gathered,
    }[engine]


def activations(train_type: str) -> float:
    """Estimate the bytes of activations of a micro-batch of 8 samples, with gradient checkpointing.

    The input of every layer; one layer's own, run again (12 tensors as wide as the model, 4 as wide as its MLP in
    bfloat16, and 4 in float32 from both norms); logits of a full chunk of supervised tokens, in bfloat16, in float32
    and with a gradient. A tower that learns keeps about 16 tensors as wide as itself per layer: it is not recomputed.
    """
    size, tokens = SIZES[REAL], MICRO_BATCH * TOKENS
    inputs = 2.0 * size.layers * size.width * tokens
    layer = tokens * (2 * (12 * size.width + 4 * size.intermediate) + 4 * 4 * size.width)
    logits = CHUNK * size.vocab_size * (2 + 4 + 4 + 2)
    tower_tokens = MICRO_BATCH * (size.num_image_tokens + 1)
    tower = 2 * 16 * size.tower_width * tower_tokens * (size.tower_layers - 1) if train_type == "full" else 0
    return inputs + layer + logits + tower


@functools.cache
def real_model(train_type: str) -> tuple[Weights, float]:
    """Return the counts of the real model, and the model FLOPs of a sample in training."""
    size = SIZES[REAL]
    config = LlavaConfig(
        vision_config=vision_config(size), text_config=text_config(size), image_token_index=size.vocab_size - 1
    )
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    values = {"model_name_or_path": "-", "data_path": "-", "output_dir": "-", "train_type": train_type}
    parameter_groups(model, TrainConfig.model_validate(values))
    flops = FlopCounter.of(model, size.num_image_tokens).step([TOKENS], 1, SUPERVISED)
    return Weights.of(model, 10 * size.width, gradient_checkpointing=True), flops


def step_s(stage: int, batch: int, num_gpus: int, node_bytes_per_s: float) -> tuple[float, float]:
    """Return the seconds of communication and of computing per step of `freeze_vision`, if nothing overlaps.

    A ring enters and leaves a node once, and NCCL lays several rings, one over each adapter: what one GPU sends in
    all rings together crosses each border between nodes once, over all adapters of the node.
    """
    weights, flops = real_model("freeze_vision")
    micro_steps = math.ceil(batch / num_gpus / MICRO_BATCH)
    sent = sum(formula(stage, weights, num_gpus, micro_steps, 2).values())
    speed = NVLINK if num_gpus <= GPUS_PER_NODE else min(NVLINK, node_bytes_per_s)
    return sent / speed, flops * batch / num_gpus / (PEAK_FLOPS * MFU)


def pays_up_to(stage: int, batch: int, node_bytes_per_s: float) -> int:
    """Return the number of GPUs up to which every doubling makes a step at least 1.5 times as fast."""
    best = NUM_GPUS[0]
    for num_gpus in NUM_GPUS[1:]:
        before, after = (sum(step_s(stage, batch, n, node_bytes_per_s)) for n in (best, num_gpus))
        if num_gpus > batch or before < _PAYS * after:
            break
        best = num_gpus
    return best


def memory_table() -> Iterator[str]:
    """Yield the rows of the memory table, in GB per GPU."""
    rows = [("plain", 1), ("zero2-offload", 1)]
    rows += [(engine, number) for engine in ENGINES for number in (4, 8, 64)]
    yield f"| engine | GPUs | {' | '.join(TRAIN_TYPES)} |"
    yield "|---|--:|" + "--:|" * len(TRAIN_TYPES)
    for engine, number in rows:
        cells = [f"{memory(engine, real_model(kind)[0], number) / 1e9:.0f}" for kind in TRAIN_TYPES]
        yield f"| {engine} | {number} | {' | '.join(cells)} |"


def share_table() -> Iterator[str]:
    """Yield the rows of the table of communication's share (`freeze_vision`)."""
    yield f"| global batch | stage | {' | '.join(map(str, NUM_GPUS))} |"
    yield "|--:|---|" + "--:|" * len(NUM_GPUS)
    for batch in (128, 1024):
        for stage in (1, 2, 3):
            steps = [step_s(stage, batch, num_gpus, LINKS[TABLE_LINK]) for num_gpus in NUM_GPUS if num_gpus <= batch]
            shares = [f"{talking / (talking + computing):.0%}" for talking, computing in steps]
            shares += ["-"] * (len(NUM_GPUS) - len(shares))
            yield f"| {batch} | ZeRO-{stage} | {' | '.join(shares)} |"


def pays_table() -> Iterator[str]:
    """Yield the rows of the table of where doubling stops paying, per kind of network."""
    cases = [(batch, stage) for batch in (128, 1024) for stage in (1, 2, 3)]
    yield "| a node of 8 GPUs has | " + " | ".join(f"{batch}, ZeRO-{stage}" for batch, stage in cases) + " |"
    yield "|---|" + "--:|" * len(cases)
    for link, speed in LINKS.items():
        cells = [str(pays_up_to(stage, batch, speed)) for batch, stage in cases]
        yield f"| {link} | {' | '.join(cells)} |"


if __name__ == "__main__":
    tables = ("\n".join(table()) for table in (memory_table, share_table, pays_table))
    sys.stdout.write("\n\n".join(tables) + "\n\nactivations: ")
    sys.stdout.write(", ".join(f"{kind} {activations(kind) / 1e9:.0f} GB" for kind in TRAIN_TYPES[2:]) + "\n")
