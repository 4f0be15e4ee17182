"""The tables of docs/scaling.md: memory per GPU and the share of communication, on paper, for the real model.

Arithmetic, not measurement; `python -m bench.scaling.paper` prints the tables; for other networks and batches change
the constants below. GB are 10^9 bytes; computed in bfloat16.
"""

import functools
import math
import sys
from collections.abc import Iterator

import torch

from bench.scaling.wire import Weights, formula
from llavaforge.engine.memory import engine_memory
from llavaforge.machine.random_model import PUBLISHED, llava_config, preprocessing, random_model, train_options
from llavaforge.model.flops import FlopCounter
from llavaforge.model.memory import activations
from llavaforge.model.trainable import parameter_groups

TRAIN_TYPES = ("projector", "use_lora", "freeze_vision", "full")  # LoRA: r = 128 on all linear layers, as the recipe
ENGINES = ("zero1", "zero2", "zero3", "zero2-offload", "zero3-offload")
NUM_GPUS = (4, 8, 16, 32, 64, 128, 256, 512)

# A sample with one image: 576 image tokens and some text.
TOKENS, SUPERVISED, MICRO_BATCH = 620, 40, 8
# Published: NVIDIA A100 data sheet (312 TFLOP/s bfloat16 dense; NVLink 600 GB/s, both ways together). Assumed: MFU.
PEAK_FLOPS, MFU, NVLINK, GPUS_PER_NODE = 312e12, 0.45, 300e9, 8
# Bytes per second that a node of 8 GPUs sends: adapters of 200 Gb/s (NVIDIA ConnectX-6 HDR data sheet); IEEE 802.3ba.
LINKS = {"8 HDR adapters": 8 * 25e9, "4 HDR adapters": 4 * 25e9, "100 Gb/s Ethernet": 12.5e9}
TABLE_LINK = "4 HDR adapters"
_PAYS = 1.5  # times as fast on twice as many GPUs


def activations_bytes(train_type: str, recompute_every: int) -> float:
    """Return the bytes of activations of a micro-batch of 8 samples, not compiled."""
    kept = activations(llava_config(PUBLISHED), train_options(train_type), preprocessing(PUBLISHED), torch.bfloat16)
    return kept.bytes(MICRO_BATCH * TOKENS, MICRO_BATCH, MICRO_BATCH * SUPERVISED, recompute_every)


@functools.cache
def real_model(train_type: str) -> tuple[Weights, float]:
    """Return the counts of the real model, and the model FLOPs of a sample in training."""
    model = random_model(PUBLISHED, torch.device("meta"), torch.bfloat16)
    parameter_groups(model, train_options(train_type))
    flops = FlopCounter.of(model, PUBLISHED.num_image_tokens).step([TOKENS], 1, SUPERVISED)
    return Weights.of(model, 10 * PUBLISHED.width, gradient_checkpointing=True), flops


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
        cells = [f"{engine_memory(engine, real_model(kind)[0].counts, number).total / 1e9:.0f}" for kind in TRAIN_TYPES]
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
    sys.stdout.write("\n\n".join(tables) + "\n\nactivations, with and without gradient_checkpointing: ")
    for kind in TRAIN_TYPES:
        with_it, without = (activations_bytes(kind, recompute_every) / 1e9 for recompute_every in (1, 0))
        sys.stdout.write(f"{kind} {with_it:.0f} / {without:.0f} GB, ")
    sys.stdout.write("\n")
