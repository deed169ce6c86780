"""docs/add/fit.md: a kind of patch is one class in one registry, and nothing else goes by its name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import linearpatch_kernels
from linearpatch_kernels.modeling.cut import keep_layers
from linearpatch_kernels.modeling.patched import patched_model, patches
from linearpatch_kernels.nn import PATCH_KINDS, Patch, PatchChain, build_patch
from linearpatch_kernels.pruning.plan import Joint, PrunePlan
from linearpatch_kernels.report.pruning import describe_patch
from linearpatch_kernels.span import Span
from tests.support.tiny import tiny_model

# Its class; the fits that give one; the public names.
NAMED_IN = {"nn.py", "pruning/closed_forms.py", "__init__.py"}


def test_the_norm_linear_patch_is_a_record_in_one_file() -> None:
    package = Path(linearpatch_kernels.__file__).parent
    sources = {str(file.relative_to(package)): file.read_text(encoding="utf-8") for file in package.rglob("*.py")}
    assert {name for name, text in sources.items() if "NormLinearPatch" in text} == NAMED_IN
    assert {name for name, text in sources.items() if '"norm-linear"' in text} == {"nn.py"}


class ClampedPatch(Patch):
    """No linear map: nothing above a bound, in units of a learnt scale."""

    kind = "clamped"
    linear = False

    def __init__(self, dim: int, bound: int, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.dim, self.bound = dim, bound
        self.unit = nn.Parameter(torch.ones(dim, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return torch.minimum(x, self.bound * self.unit.to(x.dtype))

    def description(self) -> dict[str, Any]:
        return {**super().description(), "bound": self.bound}

    @property
    def flops_per_token(self) -> int:
        return 2 * self.dim


@torch.no_grad()
def test_another_kind_goes_into_checkpoints_and_plans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PATCH_KINDS, "clamped", ClampedPatch)
    patch = ClampedPatch(48, 2)
    assert build_patch(patch.description(), dim=48).description() == patch.description()
    assert not PatchChain(patch).linear
    model = patched_model(keep_layers(tiny_model("llama"), [0, 1, 4, 5]), {2: patch})
    model.save_pretrained(tmp_path / "model")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ids = torch.arange(3, 20).unsqueeze(0)
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert isinstance(patches(again)[2][0], ClampedPatch)
    joint = Joint(Span(2, 4), patch, "own")
    assert describe_patch(joint) == "own: ClampedPatch, 48 parameters"
    PrunePlan(6, (joint,)).save(tmp_path / "plan")
    loaded = PrunePlan.load(tmp_path / "plan").joints[0].patch
    assert loaded is not None
    assert loaded.description() == [{"kind": "clamped", "dim": 48, "bound": 2}]
