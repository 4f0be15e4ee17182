"""Resumable checkpoints and atomic publishing."""
