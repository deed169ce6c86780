"""Write a stock model as one file that other engines read."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from linearpatch_kernels import __version__
from linearpatch_kernels.errors import InputError
from linearpatch_kernels.files import check_file, expanded, lies_in, record
from linearpatch_kernels.merging.plan import MERGE_FILE, MergePlan
from linearpatch_kernels.modeling.gguf_export import DTYPES, OURS, VERSION, check_stock, describe, write_gguf, wrote
from linearpatch_kernels.modeling.loading import Source
from linearpatch_kernels.processes import check_alone
from linearpatch_kernels.pruning.plan import PrunePlan
from linearpatch_kernels.recipes.inputs import GivenModel, find_model, on_disk, title_of
from linearpatch_kernels.recipes.log import Log, Reporter
from linearpatch_kernels.recipes.outputs import told_before, told_of_base
from linearpatch_kernels.report.steps import written
from linearpatch_kernels.settings import ExportSettings
from linearpatch_kernels.text import cache_dir

FORMATS = ("gguf",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportResult:
    """What `export` wrote.

    Attributes:
        output: the file.
        summary: what is in it: architecture, layers, tensors, dtype, file_bytes; notes: what it cannot say.
        seconds: stage -> seconds.
    """

    output: Path
    summary: Mapping[str, Any]
    seconds: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class _AsItIs:
    """How a model is loaded that is only to be written."""

    dtype: str = "auto"
    device: str | None = None
    trust_remote_code: bool = False


def export(
    model: GivenModel,
    settings: ExportSettings | None = None,
    *,
    tokenizer: Any = None,
    reporter: Reporter | None = None,
    **named: Any,
) -> ExportResult:
    """Write a stock model as one file that other engines read::

        lp.export("DIR", to="gguf", output="model.gguf", dtype="q8_0")

    A stock model is what `prune` and `merge` write without a patch, or any checkpoint of an architecture that GGUF
    files are read of. The file appears whole or not at all, and takes the place of nothing but a file that `export`
    wrote.

    Args:
        model, settings, tokenizer, reporter, named: as of `prune`.

    Raises:
        InputError: a patched or quantised model, one that the format cannot hold, or a place that cannot be written
            to; before the weights are loaded where that can be known.
    """
    settings = ExportSettings.of(settings, named)
    check_alone("export")
    log = Log(reporter)
    for name, given, known in (("to", settings.to, FORMATS), ("dtype", settings.dtype, (*DTYPES,))):
        if given not in known:
            raise InputError(f"`{name}` {given} is not known: choose one of {', '.join(known)}")
    _check_place(settings.output, model)
    with log.stage("check"):
        loading = _AsItIs() if isinstance(model, PreTrainedModel) else _AsItIs(device="cpu")
        source = find_model(model, loading, log, tokenizer=tokenizer)
        architecture = check_stock(source.name, source.config, quantised=source.is_quantised)
        about = _told(model, source)
        found = describe(source.name, source.config, source.tokenizer, architecture, settings.dtype, about)
        for note in found.notes:
            log.note(note)
    with log.stage("load"):
        loaded = source.load()
    with log.stage("write"):
        write_gguf(expanded(settings.output).resolve(), found, loaded, log.progress)
    summary = {
        "architecture": architecture,
        "layers": source.num_layers,
        "tensors": len(found.kinds),
        "dtype": settings.dtype,
        "file_bytes": expanded(settings.output).stat().st_size,
        "notes": [*log.notes],
        "seconds": log.rounded_seconds(),
    }
    return ExportResult(output=settings.output, summary=summary, seconds=log.seconds)


def _check_place(output: Path, model: GivenModel) -> None:
    """Whether the file can go there; a file that this package did not write stays, and so does what is read."""
    if lies_in(output, cache_dir()):
        raise InputError(f"{output} is in the cache, which is not yours to keep things in: give another file")
    read = on_disk(model)
    if read is not None and expanded(read).is_file() and expanded(output).resolve() == expanded(read).resolve():
        raise InputError(f"{output} is what the run reads: give another file")
    check_file(output, f"`output` {output}", wrote)


def _told(model: GivenModel, source: Source) -> dict[str, Any]:
    """Metadata: name, base, licence, and what was removed or merged, as the files beside the model say it."""
    place = on_disk(model)
    directory = expanded(place) if place and expanded(place).is_dir() else None
    told = {} if directory is None else told_before(directory)
    base: Mapping[str, Any] = told.get("base") or told_of_base(title_of(model), source)["base"]
    made = {} if directory is None else _made(directory, source.num_layers)
    name = str(base.get("title") or base.get("name") or title_of(model)).rpartition("/")[2]
    if made:
        name += f", {source.num_layers} of {made['layers_before']} layers"
    about: dict[str, Any] = {"general.name": name, VERSION: __version__}
    if made:
        about |= {
            "general.description": f"Made by linearpatch-kernels {__version__}: {made['what']}",
            "general.base_model.count": 1,
            "general.base_model.0.name": str(base.get("name") or title_of(model)),
        }
        if base.get("repository"):
            about["general.base_model.0.repo_url"] = f"https://huggingface.co/{base['repository']}"
        about |= {f"{OURS}{key}": value for key, value in made.items() if key != "what"}
        if "heal" in told:
            about[f"{OURS}heal"] = told["heal"]
    elif base.get("repository"):
        about["general.source.repo_url"] = f"https://huggingface.co/{base['repository']}"
    licence = {"license": "license", "license_name": "license.name", "license_link": "license.link"}
    about |= {f"general.{key}": base[known] for known, key in licence.items() if base.get(known)}
    return about | ({"general.languages": [*base["languages"]]} if base.get("languages") else {})


def _made(directory: Path, layers: int) -> dict[str, Any]:
    """What of the base's layers was removed or merged; nothing of a model that was not made here, or has another depth
    than what was."""
    merge_file = record(directory, MERGE_FILE)
    if merge_file.exists() and (merges := MergePlan.load(merge_file)).layers == layers:
        tree = " ".join(map(written, merges.tree))
        what = f"of its base's {merges.num_layers} layers these were made one: {tree}"
        return {"layers_before": merges.num_layers, "merged": tree, "what": what}
    if record(directory, "plan.json").exists() and len((plan := PrunePlan.load(directory)).kept_layers) == layers:
        spans = ",".join(map(str, plan.spans))
        what = f"of its base's {plan.num_layers} layers these were removed (half-open): {spans}"
        return {"layers_before": plan.num_layers, "removed": spans, "what": what}
    return {}
