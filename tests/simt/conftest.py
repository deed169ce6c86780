"""The emulator, compiled once for all that use it."""

from __future__ import annotations

import pytest
import torch

from tests.simt.emulator import COMPILER, Emulator, build


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    return Emulator(build(tmp_path_factory.mktemp("emulator")))


@pytest.fixture
def emulator(compiled: Emulator) -> Emulator:
    compiled.configure()
    return compiled
