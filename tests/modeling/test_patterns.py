"""The kinds of layers, and what can be removed so that they repeat as before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import linearpatch_kernels as lp
from linearpatch_kernels.errors import InputError
from linearpatch_kernels.modeling.cut import keep_layers
from linearpatch_kernels.modeling.patterns import Pattern, pattern_of
from linearpatch_kernels.span import Span
from tests.support.field import text_file
from tests.support.tiny import tiny_model, tiny_tokenizer
from tools.models_reference import tiny_decoder

SLIDING = Pattern(("s", "s", "f") * 3 + ("s",))


def brute_force(pattern: Pattern, word: str, length: int) -> list[Span]:
    spans = [Span(start, start + length) for start in range(1, len(pattern.kinds) - length)]
    rest = {span: "".join(pattern.kinds[: span.start] + pattern.kinds[span.end :]) for span in spans}
    return [span for span in spans if rest[span] == (word * 9)[: len(rest[span])]]


def test_the_period_and_what_keeps_it() -> None:
    assert (SLIDING.period, str(SLIDING)) == (3, "2 x s, f, repeated")
    for length in range(1, 9):
        if length in SLIDING.lengths:
            assert SLIDING.spans(length) == brute_force(SLIDING, "ssf", length)
        else:
            assert brute_force(SLIDING, "ssf", length) == []
    # Rounds, and what stands at the end without the rest of its round.
    assert SLIDING.lengths == [2, 3, 5, 6, 8]
    with pytest.raises(
        InputError, match=r"without any 4 layers in a row do the kinds of layers stay 2 x s, f, repeated: so"
    ):
        SLIDING.spans(4)
    SLIDING.check_kept([Span(1, 3), Span(4, 5)])
    with pytest.raises(InputError, match="without the layers 1:3 the kinds"):
        SLIDING.check_kept([Span(1, 3)])


def test_where_all_layers_are_alike_all_can_go_and_where_nothing_repeats_none() -> None:
    assert Pattern(("a",) * 5).lengths == [1, 2, 3]
    irregular = Pattern(("s", "s", "f", "s", "f"))
    assert (irregular.period, irregular.lengths, str(irregular)) == (None, [], "2 x s, f, s, f")
    with pytest.raises(InputError, match="no number of layers can go like this"):
        irregular.spans(2)


def test_the_pattern_of_models() -> None:
    assert str(pattern_of(tiny_model("gemma3_text"))) == "2 x sliding_attention, full_attention, repeated"
    assert pattern_of(tiny_model("llama")).period == 1
    assert str(pattern_of(tiny_decoder("gemma2"))) == "sliding_attention, full_attention, repeated"
    assert pattern_of(tiny_decoder("gpt2")).period == 1
    # Bamba's config lists the numbers of the layers with attention.
    assert pattern_of(tiny_decoder("bamba")).period == 4
    assert pattern_of(keep_layers(tiny_model("gemma3_text"), [0, 2, 3, 4, 5])).period is None


def test_the_commands_keep_it(tmp_path: Path) -> None:
    model: Any = tiny_model("gemma3_text")
    given: Any = {"tokenizer": tiny_tokenizer(), "text": text_file(tmp_path), "samples": 4, "length": 16}
    prune: Any = {"fit": "none", "keep_pattern": True, **given}
    made = lp.prune(model, drop=3, output=tmp_path / "three", **prune)
    assert made.plan.spans[0] in pattern_of(model).spans(3)
    for wrong in ({"drop": 2}, {"spans": "1:3"}):
        with pytest.raises(InputError, match="the kinds of layers"):
            lp.prune(model, output=tmp_path / "out", **wrong, **prune)
    for wrong in ({"drop": 3, "score": "healability-layers"}, {"target": "2x-ppl"}):
        with pytest.raises(InputError, match="tries cuts without which the kinds of layers do not stay"):
            lp.prune(model, output=tmp_path / "out", **wrong, **prune)
    # One layer less would do; the next number that keeps the pattern is three.
    assert len(lp.prune(model, target="90%-size", output=tmp_path / "size", **prune).plan.kept_layers) == 3
    with pytest.warns(match="left out: 1, 2, 4 layers less, without which their kinds do not stay"):
        swept = lp.sweep(
            model, drop="1-4", fits="none", windows=1, keep_pattern=True, output=tmp_path / "swept", **given
        )
    assert [point.drop for point in swept.points] == [3]
    with pytest.raises(InputError, match="do the kinds of layers stay"):
        lp.sweep(model, drop="2", fits="none", windows=1, keep_pattern=True, output=tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()
