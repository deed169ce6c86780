"""Speed beside peers, measured in the same run: ``python -m benchmarks`` (see `registry` for how a case is added)."""
