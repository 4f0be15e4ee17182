"""One row, in a process of its own: JSON in, JSON out."""

import json
import sys
from dataclasses import asdict
from typing import Any

from bench.gpu.rows import Row
from llavaforge.errors import is_out_of_memory, reason
from llavaforge.machine.speed import measure
from llavaforge.processes.world import World, open_world

_TIMEOUT_S = 600.0


def run(row: Row) -> dict[str, Any]:
    """Measure a row; what does not fit says so."""
    try:
        if row.side == "usual":
            from bench.gpu.usual import best

            return best(row)
        if row.deepspeed is None:
            return asdict(measure(row.work, World()))
        with open_world(1, _TIMEOUT_S, needs_group=True) as world:
            return asdict(measure(row.work, world))
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return {"error": f"out of memory: {reason(error)}"}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(run(Row(**json.loads(sys.argv[1])))) + "\n")
