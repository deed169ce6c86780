"""How the command calls the settings: the one place where a name becomes a flag."""

from __future__ import annotations

import re

from linearpatch_kernels.settings import (
    DemoSettings,
    DistillSettings,
    EvaluateSettings,
    ExportSettings,
    MergeRunSettings,
    PruneSettings,
    SweepSettings,
    fields_of,
)

SETTINGS = (
    PruneSettings,
    MergeRunSettings,
    DistillSettings,
    EvaluateSettings,
    SweepSettings,
    ExportSettings,
    DemoSettings,
)

_FLAGS = {field.name: field.flags[0] for settings in SETTINGS for field in fields_of(settings)}


def in_flags(text: str) -> str:
    """A message with the flags of the settings that it names in backticks: ``give `samples` `` -> ``give --samples``.

    What else stands in backticks stays.
    """
    return re.sub(r"`(\w+)`", lambda name: _FLAGS.get(name[1], name[0]), text)
