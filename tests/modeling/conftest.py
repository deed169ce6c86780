from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from tests.support.tiny import FAMILY_NAMES, VOCABULARY, WINDOW, tiny_model, tiny_patched_model


@pytest.fixture(params=FAMILY_NAMES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(family: str) -> PreTrainedModel:
    return tiny_model(family)


@pytest.fixture
def patched(family: str) -> PreTrainedModel:
    return tiny_patched_model(family)


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (2, 3 * WINDOW), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def assert_cache_changes_nothing() -> Callable[[PreTrainedModel], None]:
    """Greedy generation far beyond the sliding window, with and without the cache, in float64."""

    def check(model: PreTrainedModel) -> None:
        prompt = torch.randint(3, VOCABULARY, (2, 5), generator=torch.Generator().manual_seed(4))
        runs = [
            model.double().generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=3 * WINDOW,
                eos_token_id=None,
                do_sample=False,
                use_cache=use_cache,
                return_dict_in_generate=True,
                output_logits=True,
            )
            for use_cache in (True, False)
        ]
        assert runs[0].sequences.shape == (2, 5 + 3 * WINDOW)
        assert torch.equal(runs[0].sequences, runs[1].sequences)
        torch.testing.assert_close(torch.stack(runs[0].logits), torch.stack(runs[1].logits), atol=1e-9, rtol=1e-9)

    return check
