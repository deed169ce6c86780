"""The second half of LinearPatch (section 3.3): what heals the joint learns from the dense model's own answers."""
