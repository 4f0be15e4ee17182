"""The version of llavaforge that is installed."""

from importlib.metadata import version

__version__ = version("llavaforge")
