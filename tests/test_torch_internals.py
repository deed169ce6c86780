"""Private names of torch stand in one module, and the package works where torch has none of them."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from linearpatch_kernels import torch_internals
from linearpatch_kernels.torch_internals import StorageMark, has_kernel, transformed

PACKAGE = Path(torch_internals.__file__).parent
ROOT = PACKAGE.parent
SOURCES = sorted(PACKAGE.rglob("*.py"))


def private_names(source: str) -> set[str]:
    """Dotted names of torch with an underscore before one of their parts, torch.ops' own private operators included,
    and accelerate's attributes."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Attribute):
            found.add(ast.unparse(node))
        elif isinstance(node, ast.Constant) and node.value in ("_hf_hook", "_old_forward"):
            found.add(str(node.value))
    roots = ("torch.", "forward_ad.", "_hf_hook", "_old_forward")
    return {name for name in found if name.startswith(roots) and any(map(is_private, name.split(".")))}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def test_the_search_finds_private_names() -> None:
    source = (
        "import torch._dynamo\nfrom torch._ops import OpOverload\ntorch._C._x()\nhook = '_hf_hook'\ntorch.__version__"
    )
    assert private_names(source) == {"torch._dynamo", "torch._ops.OpOverload", "torch._C", "torch._C._x", "_hf_hook"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_private_names_stand_in_one_module(path: Path) -> None:
    found = private_names(path.read_text())
    assert bool(found) == (path.name == "torch_internals.py"), found


def looked_up() -> list[str]:
    calls = [node for node in ast.walk(ast.parse(Path(torch_internals.__file__).read_text())) if type(node) is ast.Call]
    return [call.args[0].value for call in calls if ast.unparse(call.func) == "_private"]  # type: ignore[attr-defined]  # they are constants


def test_this_torch_has_every_name() -> None:
    """To be told when a version takes one away, and the package grows slower without a word."""
    assert len(looked_up()) > 8
    for path in looked_up():
        found = torch
        for name in path.split("."):
            assert hasattr(found, name), path
            found = getattr(found, name)


def without_private_names(*command: str) -> str:
    variables = {**os.environ, "LINEARPATCH_PUBLIC_TORCH": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *command], env=variables, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


NOTHING_PRIVATE = """
import torch
from contextlib import nullcontext
from linearpatch_kernels import torch_internals as internals
assert internals.below_autograd is nullcontext and internals.below_versions is None
assert internals.embedding_bag_products is None and internals.where_constants_are_made() is None
assert internals.may_be_dual() and not internals.ACCELERATE_ATTRIBUTES
from linearpatch_kernels.hadamard import _FACTORS, hadamard_transform
from linearpatch_kernels.ops.hadamard_patch import hadamard_patch
x, out = torch.randn(3, 12), torch.empty(3, 12)
y = hadamard_patch(x, torch.full((12,), 2.0))
torch.testing.assert_close(y, 2 * x)
version = out._version
with torch.no_grad():
    assert hadamard_patch(x, torch.full((12,), 2.0), out=out).equal(y) and out._version > version
assert hadamard_transform(x).shape == (3, 12) and not _FACTORS
print("done")
"""


def test_nothing_private_is_used_where_that_is_asked_for() -> None:
    assert without_private_names("-c", NOTHING_PRIVATE) == "done\n"


def test_derivatives_and_dispatch_without_private_names() -> None:
    without_private_names("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/ops/test_registration.py")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["ops/test_hadamard_patch.py", "ops/test_topk_kl.py", "distillation/test_recompute.py"]
)
def test_operators_without_private_names(name: str) -> None:
    without_private_names("-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/{name}")


@pytest.fixture(params=[True, False], ids=["private", "public"])
def _both(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if not request.param:
        for name in ("_weakly", "_transforms_active", "_has_kernel", "_data_address"):
            monkeypatch.setattr(torch_internals, name, None)


@pytest.mark.usefixtures("_both")
def test_a_storage_is_known_again() -> None:
    tensor = torch.randn(3)
    mark = StorageMark(tensor)
    assert mark.marks(tensor[1:])
    assert not mark.marks(tensor.clone())


@pytest.mark.usefixtures("_both")
def test_torch_func_is_seen() -> None:
    seen = []

    def of(x: Tensor) -> Tensor:
        seen.append(transformed([x, None]))
        return x.sum()

    of(torch.ones(2))
    torch.func.grad(of)(torch.ones(2))
    torch.func.vmap(of)(torch.ones(2, 2))
    assert seen == [False, True, True]


@pytest.mark.usefixtures("_both")
def test_kernels_and_addresses() -> None:
    import linearpatch_kernels.ops.hadamard_patch  # noqa: F401  (defines what is asked for)

    assert has_kernel("hadamard_patch", "CompositeExplicitAutograd")
    assert not has_kernel("hadamard_patch", "XLA")
    tensor = torch.randn(4)
    assert torch_internals.address(tensor[1:]) == tensor[1:].data_ptr() == tensor.data_ptr() + 4
    before = tensor.data_ptr()
    lazy = torch.ops.aten._lazy_clone(tensor)
    assert (torch_internals.address(lazy) == before) == (torch_internals._data_address is not None)
