"""What makers say of their cards: peak rates and memory, by name. Without torch.

Comes in: a name as `torch.cuda.get_device_name` gives it, or as a user types it. Goes out: a row of `CARDS`.
"""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """One kind of card.

    Attributes:
        bf16_tflops: dense bfloat16 with float32 sums, in TFLOP/s.
        memory_gb: in 10^9 bytes; of a card that is sold with several, the most.
    """

    bf16_tflops: float
    memory_gb: float


# By words of the device's name; the first row that fits counts. From the makers' data sheets and white papers; where a
# sheet gives the rate with sparsity, half of it. torch sees up to 7 % more memory than the sheet says (an H200: 150.1).
CARDS = {
    "GB200": Card(2500.0, 185),
    "B200": Card(2250.0, 180),
    "GH200": Card(989.4, 96),
    "H200 NVL": Card(835.5, 141),
    "H200": Card(989.4, 141),
    "H100 PCIe": Card(756.5, 80),
    "H100 NVL": Card(835.5, 94),
    "H100": Card(989.4, 80),
    "H800 PCIe": Card(756.5, 80),
    "H800": Card(989.4, 80),
    "H20": Card(148.0, 96),
    "A100": Card(312.0, 80),
    "A800": Card(312.0, 80),
    "A40": Card(149.7, 48),
    "A30": Card(165.0, 24),
    "A10G": Card(70.0, 24),
    "A10": Card(125.0, 24),
    "L40S": Card(362.1, 48),
    "L40": Card(181.1, 48),
    "L4": Card(121.0, 24),
    "RTX PRO 6000 Blackwell": Card(503.8, 96),
    "RTX 6000 Ada": Card(364.2, 48),
    "RTX A6000": Card(154.8, 48),
    "RTX 5090": Card(209.5, 32),
    "RTX 4090": Card(165.2, 24),
    "RTX 3090 Ti": Card(80.0, 24),
    "RTX 3090": Card(71.0, 24),
    "MI325X": Card(1307.4, 256),
    "MI300X": Card(1307.4, 192),
}
# Of a chip with such a word in its name the sheet of the whole card says nothing: other clocks, or a slice of it.
_OTHERS = {"laptop", "mobile", "max", "d", "mig", "vf"}
_MEMORY = re.compile(r"(\d+)\s*gi?b", re.I)


def known_card(name: str) -> Card | None:
    """Return the row of a card by its name (`NVIDIA A100-SXM4-40GB`, `a100-40gb`), None for an unknown one.

    Memory that the name itself gives counts, where it is less (a GH200's name gives the host's 480 GB).
    """
    words = set(re.split(r"[^a-z0-9]+", _MEMORY.sub("", name).lower()))
    if words & _OTHERS:
        return None
    card = next((card for known, card in CARDS.items() if words >= set(known.lower().split())), None)
    memory = _MEMORY.search(name)
    return card if card is None or memory is None else Card(card.bf16_tflops, min(card.memory_gb, float(memory[1])))
