"""Preparing and reading data: speed and memory."""
