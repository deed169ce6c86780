"""docs/add/backend.md: an implementation that is one file. In processes of its own: operators are defined once."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from linearpatch_kernels.backend import Support
from linearpatch_kernels.errors import InputError
from linearpatch_kernels.ops import hadamard_patch  # noqa: F401  (the operators are imported)
from linearpatch_kernels.ops.backends import Backend, add_backend
from tests.support.pages import ROOT, python_of, run_program

REST = """
import json, sys

sys.path.insert(0, "TOOLS")
from linearpatch_kernels.errors import InputError

x, scale = torch.randn(3, 48), torch.rand(48)
told = {"backends": lp.backends()["float64"]}
exact = lp.hadamard_patch(x.double(), scale.double(), impl="reference")
told["exact"] = torch.equal(lp.hadamard_patch(x, scale, impl="float64"), exact.float())
told["double"] = torch.equal(lp.hadamard_patch(x.double(), scale.double(), impl="float64"), exact)


def refused(call):
    try:
        call()
    except InputError as error:
        return str(error)
    return None


told["gradient"] = refused(lambda: lp.hadamard_patch(x.requires_grad_(), scale, impl="float64").sum().backward())
told["out"] = refused(lambda: lp.hadamard_patch(x.detach(), scale, out=torch.empty(3, 48), impl="float64"))
told["norm"] = refused(lambda: lp.add_patch_rms_norm(x.detach(), x.detach(), scale, scale, 1e-6, impl="float64"))
told["loss"] = refused(
    lambda: lp.topk_kl_loss(x.detach(), torch.rand(3, 4), torch.randint(48, (3, 4)), impl="float64")
)
told["unknown"] = refused(lambda: lp.hadamard_patch(x.detach(), scale, impl="float128"))
import choices_reference

told["page"] = "| `float64` | the reference in float64, rounded once |" in choices_reference.page()
print(json.dumps(told))
"""


def test_the_page_runs(tmp_path: Path) -> None:
    file = tmp_path / "my_backend.py"
    file.write_text(python_of("add/backend.md"))
    printed = run_program(file, LINEARPATCH_BACKEND="")
    errors = {impl: float(error) for impl, error in re.findall(r"^(\w+): (\S+)$", printed, re.MULTILINE)}
    assert "reference" in errors
    assert all(error < 1e-6 for error in errors.values())


def test_it_serves_what_it_has_and_nothing_takes_its_place(tmp_path: Path) -> None:
    file = tmp_path / "using.py"
    rest = REST.replace("TOOLS", str(ROOT / "tools"))
    file.write_text(python_of("add/backend.md").partition("if __name__")[0] + rest)
    told = json.loads(run_program(file, LINEARPATCH_BACKEND=""))
    assert [told[name] for name in ("backends", "exact", "double", "page")] == [True] * 4
    assert told["gradient"] == (
        "impl='float64' has no kernel of hadamard_patch_backward: name another implementation, or none"
    )
    assert "has no kernel of hadamard_patch_out" in told["out"]
    assert "float64 has no kernel of add_patch_rms_norm" in told["norm"]
    assert "float64 has no kernel of topk_kl_loss" in told["loss"]
    assert told["unknown"].endswith("is none of auto, reference, cpu, triton, cuda, float64")


def test_doctor_lists_it(tmp_path: Path) -> None:
    file = tmp_path / "doctor.py"
    start = python_of("add/backend.md").partition("if __name__")[0]
    file.write_text(start + "\nfrom linearpatch_kernels.cli import main\n\nmain()\n")
    told = json.loads(run_program(file, "doctor", "--json", "-", LINEARPATCH_BACKEND=""))
    assert told["backends"]["float64"] == "yes"
    helped = " ".join(run_program(file, "doctor", "--help", LINEARPATCH_BACKEND="").split())
    assert "float64 (the reference in float64, rounded once)." in helped


def test_too_late_is_said() -> None:
    record = Backend("late", "never served", lambda: Support(True), lambda: ("cpu",))
    with pytest.raises(InputError, match="is imported already: add late before the operators are"):
        add_backend(record, {})
