"""Speed beside peers, measured in the same run (see `registry` for how a case is added)."""
