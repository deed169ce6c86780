"""What a config says layer by layer follows the layers that stay, also where no record names it."""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING

from linearpatch_kernels.modeling.layer_configs import config_for_layers

KEPT = [0, 1, 4, 5]


def sliced(model_type: str, **entries: Any) -> Any:
    return config_for_layers(CONFIG_MAPPING[model_type](num_hidden_layers=6, **entries), KEPT)


def test_lists_with_an_entry_per_layer() -> None:
    found = sliced("smollm3", no_rope_layers=[1, 1, 1, 0, 0, 1], eos_token_id=[2, 3, 4, 5, 6, 7])
    assert (found.num_hidden_layers, found.no_rope_layers) == (4, [1, 1, 0, 1])
    assert found.layer_types == ["full_attention"] * 4
    # As long as the model is deep by chance.
    assert found.eos_token_id == [2, 3, 4, 5, 6, 7]


def test_numbers_of_layers_and_counts_of_the_first_ones() -> None:
    assert sliced("bamba", attn_layer_indices=[1, 3, 5]).attn_layer_indices == [1, 3]
    assert sliced("qwen3_moe", mlp_only_layers=[2, 4]).mlp_only_layers == [2]
    # All of them, which is a list of numbers and not of entries.
    assert sliced("llama4_text", moe_layers=[0, 1, 2, 3, 4, 5]).moe_layers == [0, 1, 2, 3]
    for dense, left in ((1, 1), (3, 2), (5, 3)):
        assert sliced("deepseek_v3", first_k_dense_replace=dense).first_k_dense_replace == left


def test_the_config_given_does_not_change_and_all_layers_change_nothing() -> None:
    config = CONFIG_MAPPING["gemma2"](num_hidden_layers=6)
    before = config.to_dict()
    assert config_for_layers(config, range(6)).to_dict() == before
    assert config_for_layers(config, KEPT).layer_types == [before["layer_types"][layer] for layer in KEPT]
    assert config.to_dict() == before


def test_settings_of_single_layers_follow_them() -> None:
    """Where the layers that stay have none, the file says so: else they would be derived from the sizes again."""
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"]
    found = sliced("gemma4_unified_text", layer_types=[*kinds, "sliding_attention", "full_attention"])
    assert found.layer_types == [kinds[0], kinds[1], "sliding_attention", "full_attention"]
    assert [found.per_layer_config[layer].head_dim for layer in range(4)] == [256, 512, 256, 512]
    none = config_for_layers(found, [0, 2])
    assert none.to_dict()["per_layer_config"] == {}
    assert type(none)(**none.to_dict()).per_layer_config[0].head_dim == 256
