"""The one exception that a person, not a programmer, has to act on."""

from __future__ import annotations


class InputError(ValueError):
    """Input that cannot be worked with: a model, a text, a plan, a flag.

    The message is one line that says what is wrong and what to do. The command line prints it and exits with
    status 2; library users see an ordinary ``ValueError``.
    """
