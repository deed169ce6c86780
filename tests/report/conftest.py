"""The fixtures of a tiny dense model whose first token is a sink."""

from tests.support.sink import dense, heldout, statistics, windows

__all__ = ["dense", "heldout", "statistics", "windows"]
