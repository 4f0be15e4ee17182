"""Packs, made in worker processes."""
