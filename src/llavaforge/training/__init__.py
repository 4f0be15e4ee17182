"""The training run: the story, the loop, and what it leaves."""
