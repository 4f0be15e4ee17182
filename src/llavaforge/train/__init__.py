"""The training run as a story."""
