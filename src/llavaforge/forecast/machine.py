"""The machine that an estimate is for: what its cards can do, how much they hold, and the share of it that is reached.

Comes in: `--gpu`, or what `llavaforge env --check` wrote. Goes out: a `Machine`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llavaforge.config.load import nearest
from llavaforge.config.schema import EstimateConfig
from llavaforge.errors import UserError
from llavaforge.model_folder.json_files import read_json
from llavaforge.training.cards import CARDS, known_card

ASSUMED_MFU = 0.4
"""Compiled layers reached 0.43 to 0.53 on an H200, others 0.26 to 0.35 (bench/results/)."""
_TRAINED = re.compile(r"(\w+) at (?:real size|a 120th of the size)(, compiled)?")
_GIB = 2**30


@dataclass(frozen=True)
class Machine:
    """One card, and what training reaches on it.

    Attributes:
        name: of the card.
        memory_bytes: of the card.
        peak_flops: per second, dense, in the type that is computed in.
        given_mfu: the user's; it holds for all train types.
        measured_mfu: by train type, of layers that are not compiled.
        gained: times that compiled layers raise it, as measured.
    """

    name: str
    memory_bytes: float
    peak_flops: float
    given_mfu: float | None = None
    measured_mfu: Mapping[str, float] = field(default_factory=dict)
    gained: float = 1.0

    def mfu(self, train_type: str, compiled: bool) -> float:
        """Return the share of the peak that steps of a train type reach when nothing is recomputed."""
        if self.given_mfu is not None:
            return self.given_mfu
        if train_type not in self.measured_mfu:
            return ASSUMED_MFU
        return self.measured_mfu[train_type] * (self.gained if compiled else 1.0)

    @property
    def source_of_mfu(self) -> str:
        """Where the share comes from, for the reader."""
        if self.given_mfu is not None:
            return "given"
        return "measured by env --check" if self.measured_mfu else "assumed"


def read_machine(config: EstimateConfig) -> Machine:
    """Return the machine that the options name.

    Raises:
        UserError: no card is named, or an unknown one without its rate and memory; the file of `env` is unsuitable.
    """
    found = _of_env(config.env, config.bf16) if config.env is not None else {}
    name = config.gpu or found.get("name")
    if name is None:
        if config.peak_tflops is None or config.gpu_memory_gb is None:
            raise UserError(
                "estimate: no machine: give --gpu NAME (such as a100-80gb), --env FILE of `llavaforge env --check "
                "--output FILE`, or --peak_tflops and --gpu_memory_gb."
            )
        name = "the card given"
    if config.gpu is not None and found and not _is_same(config.gpu, str(found["name"])):
        raise UserError(
            f"estimate: --gpu {config.gpu}: {config.env} was measured on a {found['name']}. Give one of the two, or "
            "--mfu instead of --env."
        )
    card = known_card(name)
    # A data sheet's rate in bfloat16 says nothing of float32.
    sheet = None if card is None or config.bf16 is False else 1e12 * card.bf16_tflops
    peak = 1e12 * config.peak_tflops if config.peak_tflops else sheet or found.get("peak_flops")
    memory = 1e9 * config.gpu_memory_gb if config.gpu_memory_gb else found.get("memory_bytes")
    memory = memory or (1e9 * card.memory_gb if card is not None else None)
    if peak is None or memory is None:
        missing = " and ".join(
            flag for flag, value in (("--peak_tflops", peak), ("--gpu_memory_gb", memory)) if value is None
        )
        if card is not None:
            raise UserError(f"estimate: {name}: its rate in float32 is not known. Give {missing}, or leave out bf16.")
        raise UserError(
            f"estimate: --gpu {name}: not in the table of cards.{nearest(name, CARDS)} Known: {', '.join(CARDS)}. "
            f"For another give {missing}."
        )
    measured = {} if config.mfu is not None else found.get("mfu", {})
    return Machine(name, memory, peak, config.mfu, measured, found.get("gained", 1.0))


def _is_same(asked: str, found: str) -> bool:
    """Say whether two names are those of one kind of card."""
    card = known_card(asked)
    return asked == found or (card is not None and card == known_card(found))


def _of_env(path: Path, bf16: bool | str) -> dict[str, Any]:
    """Return what a file of `env --check` says: name, memory, best product, and MFU by train type."""
    content = read_json(path)
    try:
        device = content["devices"][0] if content["devices"] else {"name": content["cpu"]}
        memory_gib = float(device.get("memory_gib") or content["memory_gib"])
        dtype = content["compute_dtype"] if bf16 == "auto" else "bfloat16" if bf16 else "float32"
        figures = {check["name"]: check["figures"] for check in content["checks"] if check["ok"]}
        product = figures.get(f"matrix product, {dtype}", {}).get("tflops")
        speeds = {
            (match[1], bool(match[2])): float(values["mfu"])
            for name, values in figures.items()
            if (match := _TRAINED.fullmatch(name))
        }
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(f"{path}: not a file that `llavaforge env --check --output FILE` wrote. Give one.") from None
    if not speeds:
        raise UserError(f"{path}: holds no measured speed. Write it with `llavaforge env --check --output {path}`.")
    plain = {kind: mfu for (kind, compiled), mfu in speeds.items() if not compiled}
    gains = [mfu / plain[kind] for (kind, compiled), mfu in speeds.items() if compiled and plain.get(kind)]
    return {
        "name": str(device["name"]),
        "memory_bytes": memory_gib * _GIB,
        "peak_flops": None if product is None else 1e12 * float(product),
        "mfu": plain,
        "gained": max(gains, default=1.0),
    }
