"""The tables of docs/scaling.md: memory per GPU and the share of communication, on paper, for the real model.

Arithmetic, not measurement; `python -m bench.paper` prints the tables, a test compares the page with them. GB are 10^9
bytes. What each engine holds is read from `engine/plain.py` and from DeepSpeed 0.19.8 (`runtime/bf16_optimizer.py`,
`runtime/engine.py`, `runtime/zero/stage_1_and_2.py`, `stage3.py`) with the shipped files, in bfloat16.
"""

import functools
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Memory:
    """Bytes of one process, activations not counted.

    Attributes:
        weights: in bfloat16.
        gradients: accumulated in float32, and what lies beside them.
        optimizer: float32 masters and AdamW's two moments.
        backward: buffers while gradients arise: they stand beside the activations.
        stepping: buffers between the last backward pass and the next forward pass, when there are no activations.
        host: in the host's memory.
    """

    weights: float
    gradients: float
    optimizer: float
    backward: float
    stepping: float
    host: float = 0.0

    @property
    def peak(self) -> float:
        """All that the GPU holds at the worst moment."""
        return self.weights + self.gradients + self.optimizer + max(self.backward, self.stepping)


def memory(engine: str, weights: Weights, num_gpus: int) -> Memory:
    """Return what a process holds.

    plain: weights 2 bytes; what learns: master 4, gradient 4, moments 8.
    zero1: of what learns, every process keeps the gradient twice (bfloat16 of the micro-step, float32 of the step);
        before the reduction all of it is copied once more in float32 and once in bfloat16. Masters and moments dealt.
    zero2: gradients dealt as well; two buckets of bfloat16 whatever the model's size (`overlap_comm`), a copy of one
        to send, the largest gradient. AdamW makes one temporary tensor as large as a moment.
    zero3: weights dealt as well, frozen ones too; up to `MAX_LIVE` of them are gathered.
    offload: masters, moments and a gradient on the host (16 bytes), and 2 (ZeRO-2: bfloat16 weights on their way
        back) or 4 (ZeRO-3: the accumulated gradient). ZeRO-2 accumulates its share of the gradient on the GPU.
    """
    learning, dealt = weights.learning, weights.learning / num_gpus
    whole, largest = 2.0 * weights.total, 2.0 * weights.largest
    buckets = 2.0 * (2 * _BUCKET + min(_BUCKET, learning)) + largest
    gathered = 2.0 * min(MAX_LIVE, weights.total) + largest
    match engine:
        case "plain":
            return Memory(whole, 4 * learning, 12 * learning, largest, 0)
        case "zero1":
            return Memory(whole, 6 * learning, 12 * dealt, 0, 6 * learning)
        case "zero2":
            return Memory(whole, 4 * dealt, 12 * dealt, buckets, 4 * dealt)
        case "zero3":
            return Memory(whole / num_gpus, 4 * dealt, 12 * dealt, gathered, 4 * min(1e9, dealt))
        case "zero2-offload":
            return Memory(whole, 4 * dealt, 0, buckets + largest, 0, host=18 * dealt)
        case "zero3-offload":
            return Memory(whole / num_gpus, 0, 0, gathered, 0, host=20 * dealt)
    raise ValueError(f"engine {engine!r}: one of plain, {', '.join(ENGINES)}")


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


def compute_s(train_type: str, batch: int, num_gpus: int) -> float:
    """Return the seconds of computing per step."""
    return real_model(train_type)[1] * batch / num_gpus / (PEAK_FLOPS * MFU)


def communication_s(train_type: str, stage: int, batch: int, num_gpus: int, node_bytes_per_s: float) -> float:
    """Return the seconds of communication per step, if nothing overlaps.

    A ring enters and leaves a node once, and NCCL lays several rings, one over each adapter: what one GPU sends in
    all rings together crosses each border between nodes once, over all adapters of the node.
    """
    micro_steps = math.ceil(batch / num_gpus / MICRO_BATCH)
    sent = sum(formula(stage, real_model(train_type)[0], num_gpus, micro_steps, 2).values())
    return sent / (NVLINK if num_gpus <= GPUS_PER_NODE else min(NVLINK, node_bytes_per_s))


def share(train_type: str, stage: int, batch: int, num_gpus: int, node_bytes_per_s: float) -> float:
    """Return communication's share of a step."""
    talking = communication_s(train_type, stage, batch, num_gpus, node_bytes_per_s)
    return talking / (talking + compute_s(train_type, batch, num_gpus))


def pays_up_to(train_type: str, stage: int, batch: int, node_bytes_per_s: float) -> int:
    """Return the number of GPUs up to which every doubling makes a step at least 1.5 times as fast."""

    def seconds(num_gpus: int) -> float:
        talking = communication_s(train_type, stage, batch, num_gpus, node_bytes_per_s)
        return talking + compute_s(train_type, batch, num_gpus)

    best = NUM_GPUS[0]
    for num_gpus in NUM_GPUS[1:]:
        if num_gpus > batch or seconds(best) < _PAYS * seconds(num_gpus):
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
        cells = [f"{memory(engine, real_model(kind)[0], number).peak / 1e9:.0f}" for kind in TRAIN_TYPES]
        yield f"| {engine} | {number} | {' | '.join(cells)} |"


def share_table() -> Iterator[str]:
    """Yield the rows of the table of communication's share (`freeze_vision`)."""
    yield f"| global batch | stage | {' | '.join(map(str, NUM_GPUS))} |"
    yield "|--:|---|" + "--:|" * len(NUM_GPUS)
    for batch in (128, 1024):
        for stage in (1, 2, 3):
            shares = [
                f"{share('freeze_vision', stage, batch, n, LINKS[TABLE_LINK]):.0%}" if n <= batch else "-"
                for n in NUM_GPUS
            ]
            yield f"| {batch} | ZeRO-{stage} | {' | '.join(shares)} |"


def pays_table() -> Iterator[str]:
    """Yield the rows of the table of where doubling stops paying, per kind of network."""
    cases = [(batch, stage) for batch in (128, 1024) for stage in (1, 2, 3)]
    yield "| a node of 8 GPUs has | " + " | ".join(f"{batch}, ZeRO-{stage}" for batch, stage in cases) + " |"
    yield "|---|" + "--:|" * len(cases)
    for link, speed in LINKS.items():
        cells = [str(pays_up_to("freeze_vision", stage, batch, speed)) for batch, stage in cases]
        yield f"| {link} | {' | '.join(cells)} |"


if __name__ == "__main__":
    tables = ("\n".join(table()) for table in (memory_table, share_table, pays_table))
    sys.stdout.write("\n\n".join(tables) + "\n")
