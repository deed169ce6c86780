"""The model card of a result: what a person who finds the directory has to know, and `inspect` says in the terminal.

All of it is made from ``summary.json``. What the summary does not say is not said.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from huggingface_hub import ModelCardData

from linearpatch_kernels.evaluation.agreement import Quality, healed_share
from linearpatch_kernels.files import finite
from linearpatch_kernels.report import words
from linearpatch_kernels.report.page import DENSE, DROPPED
from linearpatch_kernels.report.steps import sources, steps
from linearpatch_kernels.report.tables import Table, number, percent

_PACKAGE = "linearpatch-kernels"
# What the hub takes for a licence: an identifier.
_IDENTIFIER = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_PIPELINES = {"AutoModelForCausalLM": "text-generation", "AutoModelForImageTextToText": "image-text-to-text"}


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of the card, in plain text.

    Attributes:
        lines: sentences, a line each.
        table: behind them; blocks: behind that, text that introduces it, language and content.
    """

    heading: str
    lines: Sequence[str] = ()
    table: Table | None = None
    blocks: Sequence[tuple[str, str, str]] = ()

    def __bool__(self) -> bool:
        return bool(self.lines or self.blocks or (self.table is not None and self.table.rows))

    def markdown(self) -> str:
        parts = [
            "\n".join(f"- {words.line(line)}" for line in self.lines),
            "" if self.table is None else self.table.markdown(),
            *(f"{words.line(about)}\n\n{words.fenced(content, language)}" for about, language, content in self.blocks),
        ]
        return "\n\n".join([f"## {words.line(self.heading)}", *filter(None, parts)])


def model_card(summary: Mapping[str, Any]) -> str:
    """``README.md``: the front matter that the hub reads, and the sections."""
    body = [f"# {words.line(title(summary))}", *(section.markdown() for section in sections(summary))]
    return f"---\n{_front_matter(summary)}\n---\n\n" + "\n\n".join(body) + "\n"


def title(summary: Mapping[str, Any]) -> str:
    """One line: the base and the depths."""
    return f"{_base_name(summary)}: {_depths(summary)}"


def sections(summary: Mapping[str, Any], *, loads: bool = True) -> list[Section]:
    """What there is to say, without the parts that the summary knows nothing of.

    Args:
        loads: whether the model lies beside the summary, and not its plan alone.
    """
    found = [
        Section("To be known", [*map(str, summary.get("notes") or ())]),
        Section("What was done", steps(summary)),
        _quality(summary),
        _licence(summary.get("base")),
        _loading(summary.get("result") if loads else None),
        _citation(summary),
    ]
    return [section for section in found if section]


def usage(directory: str, loader: str, *, patched: bool) -> str:
    """Python that loads a result by an Auto class of Transformers."""
    place = json.dumps(directory, ensure_ascii=False)  # Python's string, too, whatever is in the name
    registers = "import linearpatch_kernels.modeling  # registers the patched classes\n" if patched else ""
    return (
        f"from transformers import {loader}, AutoTokenizer\n"
        f"{registers}"
        f"model = {loader}.from_pretrained({place})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({place})"
    )


def _front_matter(summary: Mapping[str, Any]) -> str:
    base, result = summary.get("base") or {}, summary.get("result") or {}
    bases = [base["repository"]] if base.get("repository") else [*base.get("base_models", ())]
    licence = base.get("license", "")
    tags = [_PACKAGE, "layer-merging" if "tree" in summary else "layer-pruning"]
    known: dict[str, Any] = {
        "base_model": bases[0] if len(bases) == 1 else bases,
        "language": [*base.get("languages", ())],
        "library_name": "transformers",
        # The hub refuses a card with another word there.
        "license": licence if _IDENTIFIER.fullmatch(licence) else "",
        "license_name": base.get("license_name"),
        "license_link": base.get("license_link"),
        "pipeline_tag": _PIPELINES.get(result.get("loader", "")),
        "tags": tags + ["distillation"] * bool(summary.get("distillation")),
    }
    return ModelCardData(**{name: value for name, value in known.items() if value}).to_yaml()


def _base_name(summary: Mapping[str, Any]) -> str:
    return str((summary.get("base") or {}).get("name") or "a model")


def _depths(summary: Mapping[str, Any]) -> str:
    layers = dict(summary["num_layers"])
    dense = layers.pop("dense")
    return f"{dense} layers to {next(iter(layers.values()))}"


def _quality(summary: Mapping[str, Any]) -> Section:
    """The dense model, plain removal and this one, on the report's windows."""
    result = summary.get("result") or {}
    own = result.get("row", "")
    names = {DENSE: "the base", DROPPED: "as many layers plainly removed", own: "this model"}
    all_rows = {name: _read(one) for name, one in (summary.get("quality") or {}).items()}
    rows = {names[name]: one for name, one in all_rows.items() if name in names}
    if own not in all_rows:
        return Section("Quality")
    dense, dropped = all_rows.get(DENSE), all_rows.get(DROPPED)
    columns: dict[str, Callable[[Quality], str]] = {
        "perplexity": lambda one: number(one.perplexity),
        "top-1 agreement": lambda one: percent(one.top1_agreement),
        "KL (nats)": lambda one: "" if one.kl is None else f"{one.kl:.3f}",
        "won back": lambda one: _won_back(dense, dropped, one),
    }
    cells = {column: [cell(one) for one in rows.values()] for column, cell in columns.items()}
    shown = {column: given for column, given in cells.items() if any(given)}
    table = Table(["model", *shown], [list(row) for row in zip(rows, *shown.values(), strict=True)])
    return Section("Quality", _figures(all_rows[own], dense, dropped, str(result.get("measured_on", ""))), table)


def _figures(this: Quality, dense: Quality | None, dropped: Quality | None, text: str) -> list[str]:
    """What the table says of this model, in sentences."""
    others = {"the base": dense, "as many layers plainly removed": dropped if dropped != this else None}
    known = {name: number(one.perplexity) for name, one in others.items() if one is not None}
    beside = ", ".join(f"{name} {figure}" for name, figure in known.items() if figure)
    told = [f"Perplexity {number(this.perplexity) or 'too large'} on {text}" + (f" ({beside})." if beside else ".")]
    if share := _won_back(dense, dropped, this):
        told.append(f"Of the log-perplexity that plain removal loses, it wins back {share}.")
    if this.top1_agreement is not None:
        agrees = f"It has the likeliest token of the base at {percent(this.top1_agreement)} of the predicted positions"
        told.append(agrees + ("." if this.kl is None else f"; KL(base || model) is {this.kl:.3f} nats."))
    return told


def _read(content: Mapping[str, Any]) -> Quality:
    """A row of a summary, in which what was not measured, or is not finite, is None."""
    known = finite(content)
    figures: dict[str, Any] = {field.name: known.get(field.name) for field in dataclasses.fields(Quality)}
    return Quality(**figures)


def _won_back(dense: Quality | None, dropped: Quality | None, this: Quality) -> str:
    """Of what plain removal loses; nothing where that, or the model, was not measured, and for those two."""
    if dense is None or dropped is None or this in (dense, dropped):
        return ""
    if any(one.loss is None for one in (dense, dropped, this)):
        return ""
    return percent(healed_share(dense, dropped, this))


def _licence(base: Mapping[str, Any] | None) -> Section:
    if base is None:
        return Section("Base and licence")
    told = [f"The base is {base['name']}."]
    if base.get("title"):
        told.append(f"Its file calls it “{base['title']}”.")
    if base.get("base_models"):
        told.append(f"It says that it was made of {', '.join(base['base_models'])}.")
    named = ", ".join(filter(None, (base.get(name) for name in ("license", "license_name", "license_link"))))
    terms = ", ".join(base.get("terms", ()))
    told += [f"Its licence, as it says itself: {named}."] * bool(named)
    told += [f"Its terms lie here as they lay there: {terms}."] * bool(terms)
    told += ["It says nothing of its licence, so look there before you pass this on."] * (not named and not terms)
    return Section("Base and licence", told)


def _loading(result: Mapping[str, Any] | None) -> Section:
    if not result:
        return Section("How to load it")
    patched, loader = result["patched"], result["loader"]
    code = usage("DIR", loader, patched=patched)
    serve = "python -m vllm.entrypoints.openai.api_server --model DIR"
    if not patched:
        told = [
            "DIR stands for this directory.",
            "This is a stock model: it has the architecture of its base, and needs nothing but what loads the base.",
        ]
        blocks = [("With Transformers:", "python", code), ("With vLLM:", "sh", serve)]
    else:
        told = [
            "DIR stands for this directory.",
            "This is a patched model: it has a map at every joint, and loads in two ways, never without its maps.",
        ]
        alone = f'model = {loader}.from_pretrained("DIR", trust_remote_code=True)'
        blocks = [
            (f"With {_PACKAGE}:", "python", code),
            ("Without it, by the modeling file in DIR:", "python", f"from transformers import {loader}\n{alone}"),
            (f"With vLLM, where {_PACKAGE} is installed beside it:", "sh", serve),
            ("With vLLM alone:", "sh", f"{serve} --model-impl transformers --trust-remote-code"),
        ]
    told.append(f"Which engine loads what, and what of it was tested, says docs/engines/README.md of {_PACKAGE}.")
    return Section("How to load it", told, blocks=blocks)


def _citation(summary: Mapping[str, Any]) -> Section:
    version = (summary.get("result") or {}).get("version")
    if not version:
        return Section("Citation")
    used = sources(summary)
    told = [f"Made by {_PACKAGE} {version}.", *(f"Used: {line}." for line in used)]
    entry = f"@software{{linearpatch_kernels,\n  title = {{{_PACKAGE}}},\n  version = {{{version}}},\n}}"
    return Section("Citation", told, blocks=[("To cite it:", "bibtex", entry)])
