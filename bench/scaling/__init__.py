"""Several processes: speed, bytes sent, checkpoints."""
