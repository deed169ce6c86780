"""What a run did, in sentences, from what its ``summary.json`` says: the same for the report, the card and `inspect`.

Every sentence is plain text. What a summary does not say (those of earlier versions say less) is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from linearpatch_kernels.healing.ways import HEALS
from linearpatch_kernels.merging.scores import PLACE_SCORES
from linearpatch_kernels.pruning.fits import FITS
from linearpatch_kernels.pruning.scores import SCORES
from linearpatch_kernels.report.tables import percent
from linearpatch_kernels.span import Span

_LINEARPATCH, _COME = "LinearPatch, arXiv 2505.24680", "CoMe, arXiv 2510.15304"


def steps(summary: Mapping[str, Any]) -> list[str]:
    """What was done to the base, in its order."""
    return [
        *_calibrated(summary.get("text") or {}),
        *_removed(summary),
        *_merged(summary),
        *_healed(summary),
        *distilled(summary.get("distillation") or {}),
    ]


def _calibrated(text: Mapping[str, Any]) -> list[str]:
    if not text:
        return []
    heldout = f"; {text['heldout']} others to choose on" if text.get("heldout") else ""
    return [f"Calibrated on {text['samples']} windows of {text['length']} tokens from {_shared(text)}{heldout}."]


def _shared(text: Mapping[str, Any]) -> str:
    """A text, and in which shares it was to be made of several: of a few windows, a small share may be none."""
    shares = ", ".join(f"{name} {percent(share, 0)}" for name, share in (text.get("shares") or {}).items())
    return f"{text['source']} (shares asked for: {shares})" if shares else str(text["source"])


def _removed(summary: Mapping[str, Any]) -> list[str]:
    spans = [Span.parse(span) for span in summary.get("spans") or ()]
    if not spans:
        return []
    first, gone = spans[0], sum(span.length for span in spans)
    kept = "is the layer" if first.length == 1 else f"are the layers {first.start} to"
    told = f"Removed the layers {', '.join(map(str, spans))}, {gone} of {summary['num_layers']['dense']}"
    score = SCORES.get(summary.get("score", ""))
    chosen = "" if score is None else f" Chose them by {score.name}: {score.about}."
    return [f"{told} (half-open: {first} {kept} {first.end - 1}).{chosen}"]


def _merged(summary: Mapping[str, Any]) -> list[str]:
    nodes = [node for node in summary.get("tree") or () if isinstance(node, list)]
    if not nodes:
        return []
    layers, settings = summary["num_layers"], summary.get("settings") or {}
    score = PLACE_SCORES.get(settings.get("skip_score", ""))
    variant = f" (variant {settings['variant']})" if "variant" in settings else ""
    chosen = "" if score is None else f" Chose the places by {score.name}: {score.about}."
    merged = f"Merged {', '.join(map(written, nodes))}, in parentheses the layers that became one{variant}"
    return [f"{merged}: {layers['dense']} layers to {layers['merged']}.{chosen}"]


def written(node: Any) -> str:
    """A node of a merge tree: ``[2, [3, 4]]`` -> ``(2 (3 4))``."""
    return f"({' '.join(map(written, node))})" if isinstance(node, list) else str(node)


def _healed(summary: Mapping[str, Any]) -> list[str]:
    way, fit = HEALS.get(summary.get("heal", "")), summary.get("fit", "")
    if way is None:
        # A merge that was not healed names no way.
        return ["Not healed in closed form."] * ("tree" in summary and "text" in summary)
    told = [f"Healed by {way.name}: {way.about}." if way.patched or way.refitted else f"Not healed: {way.about}."]
    if way.patched and fit:
        told.append(f"The map is {fit}{_about(fit)}.")
    return [*told, *refit_in_words(summary.get("refit") or ())]


def _about(fit: str) -> str:
    """What a fit's name says; what was done to its map later stands behind it: ``low-rank, distilled``."""
    record = FITS.get(fit.split(",")[0])
    if record is None:
        return ""
    return f" ({'' if fit == record.name else f'{record.name}: '}{record.about}, {record.form})"


def refit_in_words(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the fits of a refit changed, and what they left alone and why."""
    changed = [row for row in rows if row["projections"] and row.get("scale") is None]
    left = dict.fromkeys(row["why"] for row in rows if row.get("why"))
    layers = [str(layer) for layer in dict.fromkeys(row["layer"] for row in changed)]
    fitted = _counted(sum(len(row["projections"]) for row in changed), "projection")
    told = f"Fitted {fitted} of the layer{'s' * (len(layers) > 1)} {', '.join(layers)} again."
    absorbed = [
        f"Layer {row['layer']} took over {_counted(row['absorbed'], 'neuron')} of removed layers."
        for row in rows
        if row.get("absorbed")
    ]
    scales = [row["scale"] for row in rows if row.get("scale") is not None]
    scaled = [f"The final norm is {scale:.3f} times what it was." for scale in scales]
    return [*[told] * bool(changed), *absorbed, *scaled, *(f"Left alone: {why}." for why in left)]


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def distillation_rows(about: Mapping[str, Any]) -> list[list[str]]:
    """A training, as ``summary.json`` has it, in a few rows of what and value."""
    curve = {int(point["step"]): point for point in about["curve"]}
    labels = f", {about['label_weight']:.0%} the text's own next tokens" if about.get("label_weight") else ""
    text = _shared({"source": about["text"], "shares": about.get("shares")})
    return [
        ["trained", f"{about['train']}: {about['parameters']:,} parameters"],
        ["loss", f"{about['loss']} over the teacher's {about['top_k']} likeliest tokens{labels}"],
        ["text", f"{about['training_windows']} windows of {about['length']} tokens from {text}"],
        ["steps", f"{about['steps_made']} of {about['steps']}, the best is {about['best_step']}"],
        ["held-out KL", f"{curve[0]['tail']:.4f} before, {curve[about['best_step']]['tail']:.4f} after"],
        ["training", f"{about['training_seconds']:.0f} s"],
    ]


def distilled(about: Mapping[str, Any]) -> list[str]:
    """A training in sentences, without the time it took; nothing where there was none."""
    if not about:
        return []
    (_, trained), *rows = distillation_rows(about)
    told = [f"{name[0].upper()}{name[1:]}: {value}." for name, value in rows if name != "training"]
    return [f"Distilled, with the base as the teacher ({trained}).", *told]


def sources(summary: Mapping[str, Any]) -> list[str]:
    """Whose ideas were used, as the records say it; not our own."""
    settings, training = summary.get("settings") or {}, summary.get("distillation") or {}
    patched, merged = (summary.get("result") or {}).get("patched"), "tree" in summary
    found: list[tuple[str, str]] = []
    if merged:
        found.append(("merging layers", _COME))
    for score in (SCORES.get(summary.get("score", "")), PLACE_SCORES.get(settings.get("skip_score", ""))):
        if score is not None:
            found.append((f"what chose the layers ({score.name})", score.source))
    fit = FITS.get(str(summary.get("fit", "")).split(",")[0])
    if fit is not None and patched:
        found.append((f"the map at the joint ({fit.name})", fit.source))
        if "H diag" in fit.form and _LINEARPATCH not in fit.source:
            found.append(("a diagonal between two Hadamard transforms", _LINEARPATCH))
    if training.get("loss") == "topk":
        found.append(("the loss over the teacher's likeliest tokens", f"{_LINEARPATCH}, section 3.3"))
    if training and merged:
        found.append(("training layer by layer", _COME))
    return [f"{what}: {source}" for what, source in found if not source.startswith("ours")]
