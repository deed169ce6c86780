"""Environments of engines that are not in ours, and what an engine is held against; for tests and benchmarks."""
