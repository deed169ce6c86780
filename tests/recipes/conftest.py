"""A model and a text on disk for the recipes that heal."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.field import save_model, text_file, tiny


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("healing")
    save_model(tiny(), folder / "dense")
    text_file(folder, 6000)
    return folder
