"""How a step runs: one process or several."""
