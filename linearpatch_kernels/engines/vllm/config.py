"""The config of a patched checkpoint as vLLM needs it: that of the stock model, with the record of the joints.

vLLM asks the ``model_type`` of a config in many places (windows, kernels, positions), and knows that of the stock model
only. So it gets a config of the stock class, which keeps the patched architecture's name and ``linearpatch``.
"""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig
from vllm.model_executor.models.config import MODELS_CONFIG_MAP
from vllm.transformers_utils import config as vllm_config

from linearpatch_kernels.engines.vllm import PREFIX, warn_if_untested, without_warnings

_FORMAT = "hf"


def add_reader() -> None:
    """Have vLLM read the configs of patched checkpoints; all others are read as before."""
    present = type(vllm_config.get_config_parser(_FORMAT))
    if getattr(present, "reads_linearpatch", False):
        return

    class Reader(present):  # type: ignore[valid-type, misc]  # whichever class vLLM has there
        reads_linearpatch = True

        def parse(
            self,
            model: Any,
            trust_remote_code: bool,
            revision: str | None = None,
            code_revision: str | None = None,
            **kwargs: Any,
        ) -> tuple[dict[str, Any], PretrainedConfig]:
            place = {"revision": revision, "code_revision": code_revision}
            entries, _ = PretrainedConfig.get_config_dict(model, **place)
            patched = str(entries.get("model_type")).startswith("linearpatch_")
            if not patched:
                return super().parse(model, trust_remote_code, **place, **kwargs)
            # Imported here: it takes seconds, which no other model has to wait for.
            from linearpatch_kernels.modeling.families import family_of
            from linearpatch_kernels.modeling.patched import twin_of

            warn_if_untested()
            twin_of(family_of(entries["model_type"]))
            # No code of the checkpoint's own: the class that was just made reads it.
            entries, config = super().parse(model, False, **place, **kwargs)
            return entries, as_stock(config)

    # It warns that another class reads this format from now on.
    with without_warnings(vllm_config.__name__):
        vllm_config.register_config_parser(_FORMAT)(Reader)


def as_stock(config: Any) -> PretrainedConfig:
    """A patched config as one of the stock class, with ``linearpatch`` and the patched architecture's name."""
    from linearpatch_kernels.modeling.families import family_of

    stock: PretrainedConfig = family_of(config).config_class()
    vars(stock).update({name: value for name, value in vars(config).items() if name != "model_type"})
    # For --model-impl transformers, which runs the checkpoint's own code.
    stock.auto_map = dict(config.auto_map)
    for name in config.architectures or ():
        # What vLLM changes in the settings of some models it finds by their architectures.
        stock_name = name.removeprefix(PREFIX)
        if stock_name in MODELS_CONFIG_MAP:
            MODELS_CONFIG_MAP.setdefault(name, MODELS_CONFIG_MAP[stock_name])
    return stock
