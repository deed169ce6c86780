"""A merge plan beside a checkpoint, compared with what the checkpoint's config says (see `pruning.consistency`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from linearpatch_kernels.files import refuse_mixture
from linearpatch_kernels.merging.plan import MERGE_FILE, MergePlan
from linearpatch_kernels.modeling.config_forms import of_decoder, written_sizes


def check_merges(plan: MergePlan, config: Mapping[str, Any], directory: Path) -> None:
    """InputError where ``merge.json`` and the content of ``config.json`` in a directory tell of different merges."""
    layers, tree = written_sizes(config)[0], of_decoder(config).get("linearpatch_merge_tree")
    if layers != plan.layers:
        refuse_mixture(directory, f"{MERGE_FILE} leaves {plan.layers} layers and config.json has {layers}")
    if not isinstance(tree, list) or not _grown_from(plan.tree, tree):
        refuse_mixture(directory, f"{MERGE_FILE} merges to {plan.tree} and config.json tells of {tree}")


def _grown_from(plan: list[Any], tree: list[Any]) -> bool:
    """Whether a tree is that of the plan, each of whose leaves may have been merged before."""
    return len(plan) == len(tree) and all(
        not isinstance(ours, list) or (isinstance(its, list) and _grown_from(ours, its))
        for ours, its in zip(plan, tree, strict=True)
    )
