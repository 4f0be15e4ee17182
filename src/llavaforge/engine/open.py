"""Which engine a run gets."""

from typing import Any

from llavaforge.engine.base import Engine
from llavaforge.engine.plain import PlainEngine
from llavaforge.processes.world import World


def open_engine(world: World, deepspeed_settings: dict[str, Any] | None) -> Engine:
    """Return the engine of this process: plain without DeepSpeed settings, ZeRO with them."""
    if deepspeed_settings is None:
        return PlainEngine(world)
    from llavaforge.engine.zero import ZeroEngine  # an extra: only imported where it is used

    return ZeroEngine(world, deepspeed_settings)
