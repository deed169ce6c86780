"""The fixtures of a tiny dense model whose first token is a sink."""

from tests.support.sink import dense, windows

__all__ = ["dense", "windows"]
