"""What a run uses: its time and its work by part, and its memory by part.

Comes in: a clock's seconds and a pack's model FLOPs, step by step. Goes out: shares and MFU for a line of metrics, a
sentence for the log.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from llavaforge.clock import DATA, LANGUAGE_MODEL, OTHER, PARTS, TOWER
from llavaforge.device import compute_dtype
from llavaforge.engine.base import Engine
from llavaforge.engine.memory import engine_memory
from llavaforge.model.activations import CHUNK, logits_bytes
from llavaforge.training.opening import OpenedStage

NAMES = {TOWER: "vision tower", LANGUAGE_MODEL: "language model", DATA: "waiting for images"}
_LEAST_SHOWN = 0.005
_SHOWN_FROM = 0.1  # share of the time that waiting for images must take to be shown with every line


@dataclass
class Usage:
    """Sums over steps of this process.

    Attributes:
        seconds: of each part (`clock.PARTS`).
        flops: model FLOPs of tower and language model.
        recomputed: FLOPs that gradient checkpointing did again.
    """

    seconds: Counter[str] = field(default_factory=Counter)
    flops: Counter[str] = field(default_factory=Counter)
    recomputed: float = 0.0

    def add(self, seconds: Mapping[str, float], flops: Mapping[str, float] | None = None, again: float = 0.0) -> None:
        """Add what was used."""
        self.seconds.update(seconds)
        self.flops.update(flops or {})
        self.recomputed += again

    def since(self, before: "Usage") -> "Usage":
        """Return what was used since an earlier copy of this."""
        again = self.recomputed - before.recomputed
        return Usage(self.seconds - before.seconds, self.flops - before.flops, again)

    def copy(self) -> "Usage":
        """Return a copy."""
        return Usage(Counter(self.seconds), Counter(self.flops), self.recomputed)

    def metrics(self, peak_flops: float) -> dict[str, float]:
        """Return `time_s`; `time_share_*` of every part; `mfu_*` of tower and language model, each in its own time.

        `mfu_language_model` leaves out what is recomputed; `hfu` is of the whole time and counts it (hardware FLOPs
        utilization; Chowdhery et al. 2022, appendix B).

        Args:
            peak_flops: of this process's device, per second.
        """
        total = sum(self.seconds.values())
        if not total:
            return {}
        line = {"time_s": total} | {f"time_share_{part}": round(self.seconds[part] / total, 4) for part in PARTS}
        for part, flops in self.flops.items():
            if flops and self.seconds[part]:
                line[f"mfu_{part}"] = flops / self.seconds[part] / peak_flops
        if self.recomputed:
            line["hfu"] = (sum(self.flops.values()) + self.recomputed) / total / peak_flops
        return line

    def waiting(self) -> str:
        """Return what to show of waiting for images; nothing where it is little."""
        share = self.seconds[DATA] / max(1e-9, sum(self.seconds.values()))
        return f"waiting for images {share:.0%}  " if share >= _SHOWN_FROM else ""

    def __str__(self) -> str:
        total = max(1e-9, sum(self.seconds.values()))
        parts = sorted(PARTS, key=lambda part: (part == OTHER, -self.seconds[part]))
        shares = {NAMES.get(part, part): self.seconds[part] / total for part in parts}
        return ", ".join(f"{name} {share:.0%}" for name, share in shares.items() if share >= _LEAST_SHOWN)


def memory_by_part(opened: OpenedStage, engine: Engine) -> str:
    """Return a sentence on the peak of this process's memory: what is known of the parts, and the rest as measured.

    Args:
        opened: the stage.
        engine: that has taken a step.
    """
    config, size = opened.config, compute_dtype(opened.config.bf16).itemsize
    kept = engine_memory(engine.name, opened.counts, engine.world.size, size, config.optim == "adamw_8bit")
    supervised = opened.data.index.num_supervised[opened.data.mixture.all_rows].max() * config.max_samples_per_batch
    logits = logits_bytes(opened.loaded.model.config.get_text_config().vocab_size, size) * min(CHUNK, int(supervised))
    parts = {"weights": kept.weights, "gradients": kept.gradients, "optimizer": kept.optimizer, "logits": logits}
    peak = engine.peak_memory_bytes()
    known = ", ".join(f"{name} {number / 1e9:.1f}" for name, number in parts.items())
    rest = max(0.0, peak - sum(parts.values()))
    return f"peak memory {peak / 1e9:.1f} GB: {known}, activations, buffers and all else {rest / 1e9:.1f}"
