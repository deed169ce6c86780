"""The authors' loop that ours is held against, and how results are kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from benchmarks.studies.authors_loop import AuthorsLoop
from benchmarks.studies.distillation import (
    METHODS,
    Results,
    Row,
    compare_steps,
    default_rows,
    group_name,
    healed_share,
    step_rows,
    table_rows,
)
from linearpatch_kernels.calibration import Span
from linearpatch_kernels.distillation.teacher_store import TeacherStore, write_teacher_store
from linearpatch_kernels.distillation.trainer import SuffixLoss, joint_state
from linearpatch_kernels.modeling.patched import patches
from linearpatch_kernels.pruning.apply import apply_plan
from linearpatch_kernels.pruning.plan import Joint, PrunePlan
from tests.support.tiny import VOCABULARY, random_patch, tiny_model

JOINT = 2


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TeacherStore:
    windows = torch.randint(3, VOCABULARY, (4, 20), generator=torch.Generator().manual_seed(0))
    return write_teacher_store(tiny_model("llama"), windows, tmp_path_factory.mktemp("store"), top_k=10)


def student() -> PreTrainedModel:
    return apply_plan(tiny_model("llama"), PrunePlan(6, (Joint(Span(2, 4), random_patch("dense"), "test"),)))


def test_its_loss_and_gradient_are_those_of_topk(store: TeacherStore) -> None:
    loop, ours = AuthorsLoop(student(), store, JOINT, 1e-3, 8), student()
    value = loop.step(0)
    weight = patches(ours)[JOINT][0].weight
    batch = store.batch([0])
    mine = SuffixLoss(ours, JOINT)(joint_state(ours, batch, JOINT), batch.probs, batch.ids, ["topk"])[0]
    mine.backward()
    assert float(mine.detach()) == pytest.approx(value, rel=1e-5)
    torch.testing.assert_close(loop.matrix.grad, weight.grad, rtol=1e-4, atol=1e-7)
    assert float(weight.grad.norm()) > 0


def test_it_goes_on_bit_for_bit(store: TeacherStore, tmp_path: Path) -> None:
    whole, first = (AuthorsLoop(student(), store, JOINT, 1e-3, 8) for _ in range(2))
    for step in range(4):
        whole.step(step)
        if step < 2:
            first.step(step)
    first.save(tmp_path / "state.pt", {"curve": [{"step": 2}]})
    again = AuthorsLoop(student(), store, JOINT, 1e-3, 8)
    assert again.load(tmp_path / "state.pt") == {"curve": [{"step": 2}]}
    assert again.done == 2
    for step in (2, 3):
        again.step(step)
    assert torch.equal(again.matrix, whole.matrix)
    assert not torch.equal(again.matrix, first.matrix)


def test_rows_have_names_of_their_own() -> None:
    rows = default_rows()
    assert [Row.parse(str(row)) for row in rows] == rows
    assert len(set(rows)) == len(rows)
    assert {row.method for row in rows} <= set(METHODS)
    with pytest.raises(SystemExit, match="no method is called 'theirs'"):
        Row.parse("6/theirs/0")


def test_two_processes_keep_each_others_results(tmp_path: Path) -> None:
    one, two = Results(tmp_path / "rows.json"), Results(tmp_path / "rows.json")
    one.put("a", 1)
    two.put("b", 2)
    assert Results(tmp_path / "rows.json").content == {"a": 1, "b": 2}


def test_what_is_healed() -> None:
    dense, dropped, half = ({"quality": {"text": {"loss": loss}}} for loss in (3.0, 4.0, 3.5))
    assert healed_share(dense, dropped, half, "text") == pytest.approx(0.5)
    assert healed_share(dense, dropped, dropped, "text") == 0


class Clock:
    """Moves on by what a case says it takes."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Case:
    def __init__(self, clock: Clock, *seconds: float) -> None:
        self.clock, self.seconds = clock, list(seconds)

    def step(self, window: int) -> None:
        self.clock.now += self.seconds[window]


def test_a_step_is_compared_with_theirs_of_the_same_round(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr("time.perf_counter", clock)
    found = compare_steps({"authors": Case(clock, 2.0, 8.0, 4.0), "ours": Case(clock, 1.0, 2.0, 2.0)}, rounds=3)
    assert found == {
        "authors": {"seconds": 4.0, "of theirs": 1.0},
        "ours": {"seconds": 2.0, "of theirs": 0.5},
    }


def test_steps_and_their_memory_are_shown_and_make_the_minutes() -> None:
    one = {"quality": {text: {"loss": 3.0, "agreement": 0.5} for text in ("BoolQ passages", "LAMBADA passages")}}
    results = {
        group_name("step of 2 threads", 9): {name: {"seconds": 3.0, "of theirs": 0.5} for name in ("authors", "fast")},
        group_name("memory live", 9): {"authors": 4e8, "fast": 1e8},
        "dense": one,
        "9/authors/0.001": {
            **one,
            "span": "12:21",
            "parameters": 4,
            "curve": [{"tail": 0.5}, {"tail": 0.25}],
            "commit": "abc1234",
        },
        "6/authors/0.001": {**one, "span": "13:19", "parameters": 4, "structured": [0.25, 0.5]},
    }
    assert list(step_rows(results, 9, 2)) == [
        ("authors", "3.00", "0.50", "400", "1.00", "", ""),
        ("fast", "3.00", "0.50", "100", "0.25", "", ""),
    ]
    assert list(step_rows(results, 9, 1)) == list(step_rows(results, 6, 2)) == []
    nine, six = (list(table_rows(results, drop))[1] for drop in (9, 6))
    assert (nine[4], *nine[-2:]) == ("0.5000 to 0.2500", "5.0", "abc1234")
    assert (six[4], *six[-2:]) == ("0.2500 to 0.5000", "", "not kept")
