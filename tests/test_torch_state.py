"""The process's settings of torch that ours is computed under, and that the caller gets back."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from linearpatch_kernels import torch_state
from linearpatch_kernels.torch_state import eval_mode, evaluation_mode, faster_float32_products


def settings() -> tuple[str, ...]:
    return (
        torch.get_float32_matmul_precision(),
        torch.backends.fp32_precision,
        torch.backends.mkldnn.fp32_precision,
        torch.backends.mkldnn.matmul.fp32_precision,
        torch.backends.cuda.matmul.fp32_precision,
    )


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """The probe is made anew in every test; no test leaves a setting behind."""
    before = torch_state._precision()
    torch_state._onednn_serves.cache_clear()
    yield
    torch_state._onednn_serves.cache_clear()
    assert before is not None
    torch_state._restore(before)


@pytest.fixture
def amd(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor that oneDNN was measured on, which makes no bfloat16 of float32."""
    monkeypatch.setattr(torch_state, "_cpu_information", lambda: "vendor_id : AuthenticAMD")
    monkeypatch.setattr(torch_state, "_LARGEST_RATIO", float("inf"))
    monkeypatch.setattr(torch_state, "_accelerator", lambda: "cpu")


@pytest.mark.parametrize("modes", [(True, True, False), (False, True, False), (True, False, True)])
def test_every_part_gets_its_mode_back(modes: tuple[bool, ...]) -> None:
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Dropout())
    for part, mode in zip(model.modules(), modes, strict=True):
        part.training = mode
    with eval_mode(model, "a name"):
        assert not any(part.training for part in model.modules())
    assert tuple(part.training for part in model.modules()) == modes


@pytest.mark.usefixtures("amd")
def test_the_caller_gets_the_settings_back() -> None:
    def interrupted() -> None:
        with faster_float32_products():
            assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
            with evaluation_mode():
                assert torch.get_float32_matmul_precision() == "medium"
            assert torch.get_float32_matmul_precision() == "medium"
            raise KeyError

    before = settings()
    with pytest.raises(KeyError):
        interrupted()
    assert settings() == before


@pytest.mark.usefixtures("amd")
@pytest.mark.parametrize("chosen", ["high", "medium"])
def test_what_the_caller_chose_stays(chosen: str) -> None:
    torch.set_float32_matmul_precision(chosen)
    before = settings()
    with faster_float32_products():
        assert settings() == before
    assert settings() == before


@pytest.mark.usefixtures("amd")
def test_what_the_caller_chose_by_the_newer_interface_stays() -> None:
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"  # get_float32_matmul_precision raises from here on
    with faster_float32_products():
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    torch.backends.mkldnn.matmul.fp32_precision = "none"


@pytest.mark.usefixtures("amd")
@pytest.mark.parametrize(
    ("name", "value"),
    [("_LARGEST_RATIO", 0.0), ("_cpu_information", lambda: "GenuineIntel"), ("_accelerator", lambda: "cuda")],
    ids=["its products are rounded", "never measured on such a processor", "the switch is a GPU's too"],
)
def test_nothing_is_changed_where(monkeypatch: pytest.MonkeyPatch, name: str, value: Any) -> None:
    monkeypatch.setattr(torch_state, name, value)
    before = settings()
    with faster_float32_products():
        assert settings() == before
    assert settings() == before


def test_products_keep_the_precision_of_float32() -> None:
    """Whatever this machine's processor is."""
    for rows, inner, columns in ((3, 5, 7), (64, 576, 1536), (16, 8192, 33)):
        a, b = torch.randn(rows, inner), torch.randn(columns, inner)
        exact = a.double() @ b.double().mT
        usual = torch.linalg.norm(torch.nn.functional.linear(a, b) - exact)
        with faster_float32_products():
            ours = torch.linalg.norm(torch.nn.functional.linear(a, b) - exact)
        assert ours <= 4 * usual + 1e-6 * torch.linalg.norm(exact)


@pytest.mark.usefixtures("amd")
def test_the_setting_stays_until_the_last_thread_is_out() -> None:
    """Else what one thread computes would depend on when another one was done."""
    before = settings()
    inside, leave = threading.Event(), threading.Event()
    seen: list[str] = []

    def other() -> None:
        with faster_float32_products():
            inside.set()
            leave.wait(timeout=60)
            seen.append(torch.backends.mkldnn.matmul.fp32_precision)

    thread = threading.Thread(target=other)
    with faster_float32_products():
        thread.start()
        assert inside.wait(timeout=60)
    assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    leave.set()
    thread.join(timeout=60)
    assert seen == ["bf16"]
    assert settings() == before
