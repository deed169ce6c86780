"""What `backends()` says, in processes of their own: the environment is read once, at import."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from linearpatch_kernels import backend
from linearpatch_kernels.ops.backends import backends
from linearpatch_kernels.ops.hadamard_patch import add_patch_rms_norm, hadamard_patch
from linearpatch_kernels.ops.registration import define_operator
from linearpatch_kernels.ops.topk_kl import linear_topk_kl_loss, topk_kl_loss

PROBE = """
import json, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import linearpatch_kernels.ops.hadamard_patch
    import linearpatch_kernels.ops.topk_kl
import torch
from linearpatch_kernels.ops.backends import backends
y = linearpatch_kernels.ops.hadamard_patch.hadamard_patch(torch.ones(1, 4), torch.full((4,), 2.0))
ours = [str(w.message) for w in caught if "linearpatch" in str(w.message)]
print(json.dumps({"backends": backends(), "warnings": ours, "y": y.tolist()}))
"""


def probe(package: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {name: value for name, value in os.environ.items() if name != "LINEARPATCH_BACKEND"}
    root = Path(backend.__file__).parent.parent if package is None else package
    variables |= {"PYTHONPATH": str(root), **environment}
    command = [sys.executable, "-P", "-c", PROBE]
    return subprocess.run(command, env=variables, capture_output=True, text=True, check=False)


def package_with_extension(folder: Path, content: bytes | None) -> Path:
    """This package by links, with another extension or none."""
    (folder / "linearpatch_kernels").mkdir()
    for entry in Path(backend.__file__).parent.iterdir():
        if entry.suffix != ".so" and entry.name not in ("backend.py", "__pycache__"):
            (folder / "linearpatch_kernels" / entry.name).symlink_to(entry)
    source = Path(backend.__file__).read_text()
    (folder / "linearpatch_kernels" / "backend.py").write_text(source)
    if content is not None:
        (folder / "linearpatch_kernels" / "_C.abi3.so").write_bytes(content)
    return folder


def test_names_and_answers() -> None:
    answers = backends()
    assert list(answers) == ["reference", "cpu", "triton", "cuda"]
    assert answers["reference"] is True
    assert all(answer is True or (isinstance(answer, str) and "\n" not in answer) for answer in answers.values())


def test_missing_extension_is_one_warning(tmp_path: Path) -> None:
    result = probe(package_with_extension(tmp_path, None), LINEARPATCH_BACKEND="")  # empty forces nothing
    assert result.returncode == 0, result.stderr
    told = json.loads(result.stdout)
    assert len(told["warnings"]) == 1
    assert "_C.abi3.so is not built" in told["warnings"][0]
    assert "is not built" in told["backends"]["cpu"]
    assert told["y"] == [[2.0] * 4]


def test_broken_extension_is_one_warning(tmp_path: Path) -> None:
    result = probe(package_with_extension(tmp_path, b"not a library"))
    assert result.returncode == 0, result.stderr
    told = json.loads(result.stdout)
    assert len(told["warnings"]) == 1
    assert "does not load" in told["warnings"][0]
    assert told["y"] == [[2.0] * 4]


def test_reference_can_be_forced() -> None:
    told = json.loads(probe(LINEARPATCH_BACKEND="reference").stdout)
    assert told["warnings"] == []
    assert told["backends"]["reference"] is True
    assert "LINEARPATCH_BACKEND=reference" in told["backends"]["cpu"]
    assert told["y"] == [[2.0] * 4]


def test_forcing_what_is_not_there_raises(tmp_path: Path) -> None:
    result = probe(package_with_extension(tmp_path, None), LINEARPATCH_BACKEND="cpu")
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert "InputError: LINEARPATCH_BACKEND=cpu is not available: _C.abi3.so is not built" in last


def test_cuda_asked_for_where_it_cannot_run_raises() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    result = probe(LINEARPATCH_BACKEND="cuda")
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert "InputError: LINEARPATCH_BACKEND=cuda is not available: " in last
    assert any(
        why in last for why in ("is not built", "built without nvcc", "not a CUDA build", "no CUDA device or driver")
    )


@pytest.mark.parametrize(
    ("compiled", "version", "device", "said"),
    [
        (False, "13.0", True, "was built without nvcc: reinstall with the CUDA toolkit to have it"),
        (True, None, False, "the kernels are built, but torch .* is not a CUDA build"),
        (True, "13.0", False, "the kernels are built, but torch finds no CUDA device or driver"),
    ],
    ids=["no nvcc", "torch for CPUs", "no driver"],
)
def test_why_cuda_cannot_run(
    monkeypatch: pytest.MonkeyPatch, compiled: bool, version: str | None, device: bool, said: str
) -> None:
    monkeypatch.setattr(backend, "_EXTENSION_MISSING", None)
    monkeypatch.setattr(backend, "_compiled_for", lambda key: key == "CUDA" and compiled)
    monkeypatch.setattr(torch.version, "cuda", version)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device)
    assert re.search(said, str(backends()["cuda"]))


def test_who_is_compiled_for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked in every call: thousands of operators are not listed for it."""
    monkeypatch.setattr(backend, "FORCED", None)
    there = "linearpatch::hadamard_patch" in torch._C._dispatch_get_registrations_for_dispatch_key("CUDA")
    monkeypatch.delattr(torch._C, "_dispatch_get_registrations_for_dispatch_key")
    assert backend.compiled_for_gpus("cuda", "hadamard_patch") == there
    assert not backend.compiled_for_gpus("cpu", "hadamard_patch")
    assert not backend.compiled_for_gpus("cuda", "hadamard_patch_reference")
    assert not backend.compiled_for_gpus("cuda", "nothing_of_that_name")
    monkeypatch.setattr(backend, "FORCED", "triton")
    assert not backend.compiled_for_gpus("cuda", "hadamard_patch")


def test_unknown_name_raises() -> None:
    result = probe(LINEARPATCH_BACKEND="fast")
    assert result.returncode == 1
    assert "LINEARPATCH_BACKEND=fast is none of reference, cpu, triton, cuda" in result.stderr


def operators_on(device: str) -> dict[str, Callable[[], Tensor]]:
    """The public functions on a few ones."""
    x, wide, norm = torch.ones(2, 4, device=device), torch.ones(4, device=device), torch.ones(4, device=device)
    probs, ids = torch.ones(2, 1, device=device), torch.ones(2, 1, dtype=torch.int64, device=device)
    weight = torch.ones(3, 4, device=device)
    return {
        "hadamard_patch": lambda: hadamard_patch(x, wide),
        "hadamard_patch with out": lambda: hadamard_patch(x, wide, out=torch.empty_like(x)),
        "add_patch_rms_norm": lambda: add_patch_rms_norm(x, x, wide, norm, 1e-6)[0],
        "topk_kl_loss": lambda: topk_kl_loss(x, probs, ids),
        "linear_topk_kl_loss": lambda: linear_topk_kl_loss(x, weight, probs, ids),
    }


@pytest.mark.parametrize("name", operators_on("meta"))
def test_forced_backend_is_not_replaced_by_another(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(backend, "FORCED", "cuda")
    operator = name.removesuffix(" with out")
    with pytest.raises(RuntimeError, match=f"LINEARPATCH_BACKEND=cuda has no {operator} for cpu tensors: unset it"):
        operators_on("cpu")[name]()
    assert operators_on("meta")[name]().device.type == "meta"
    with FakeTensorMode():
        assert operators_on("cpu")[name]().device.type == "cpu"
    for served in ("cpu", "reference"):
        monkeypatch.setattr(backend, "FORCED", served)
        assert backend.check_forced_serves(operator, torch.empty(0)) is None
    assert operators_on("cpu")[name]().isfinite().all()


def test_forced_backend_under_export_and_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    class Joint(torch.nn.Module):
        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            return hadamard_patch(x, scale)

    monkeypatch.setattr(backend, "FORCED", "cuda")
    example = torch.ones(2, 4), torch.ones(4)
    assert "hadamard_patch" in str(torch.export.export(Joint(), example, strict=False).graph)
    with pytest.raises(RuntimeError, match="LINEARPATCH_BACKEND=cuda has no hadamard_patch for cpu tensors"):
        torch.compile(Joint(), backend="eager")(*example)


def test_forced_backend_is_not_replaced_by_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    operator = define_operator("without_a_kernel", "(Tensor x) -> Tensor", torch.clone, torch.empty_like)
    assert operator(torch.ones(2)).eq(1).all()
    monkeypatch.setattr(backend, "FORCED", "cpu")
    with pytest.raises(RuntimeError, match="LINEARPATCH_BACKEND=cpu has no without_a_kernel for cpu tensors"):
        operator(torch.ones(2))
    monkeypatch.setattr(backend, "FORCED", "reference")
    assert operator(torch.ones(2)).eq(1).all()


def test_package_root_is_light_and_its_names_are_there() -> None:
    script = """
import sys, torch
before = set(sys.modules)
import linearpatch_kernels
assert set(sys.modules) - before == {"linearpatch_kernels"}, sorted(set(sys.modules) - before)
for name in linearpatch_kernels.__all__:
    found = getattr(linearpatch_kernels, name)
    assert getattr(found, "__module__", found.__name__).startswith("linearpatch_kernels."), name
assert set(linearpatch_kernels.__all__) == set(linearpatch_kernels._MODULE_OF)
assert set(linearpatch_kernels.__all__) <= set(dir(linearpatch_kernels))
try:
    linearpatch_kernels.nothing
except AttributeError as error:
    assert "nothing" in str(error)
else:
    raise AssertionError
"""
    root = str(Path(backend.__file__).parent.parent)
    variables = {**os.environ, "PYTHONPATH": root}
    result = subprocess.run(
        [sys.executable, "-P", "-c", script], env=variables, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
