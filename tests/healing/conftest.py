"""The fixtures of a tiny dense model whose first token is a sink."""

from tests.support.sink import dense, heldout, windows

__all__ = ["dense", "heldout", "windows"]
