"""The help texts of the ``linearpatch`` command -> ``docs/reference/cli.md``.

``python tools/cli_reference.py`` writes the page, with a Python that has the package. A test compares the page with
what the command makes now.
"""

from __future__ import annotations

from pathlib import Path

import typer
from typer.cli import get_docs_for_click
from typer.main import get_command

from linearpatch_kernels.cli import app

PAGE = Path(__file__).resolve().parent.parent / "docs" / "reference" / "cli.md"
MADE_BY = "<!-- made by tools/cli_reference.py from the help texts: change those, not this page -->"


def page() -> str:
    """The whole page in Markdown."""
    command = get_command(app)
    context = typer.Context(command)
    written = get_docs_for_click(obj=command, ctx=context, name="linearpatch")
    # Typer cuts the sentences of its list of commands short.
    head, _, rest = written.partition("**Commands**:")
    details = rest[rest.index("\n## ") :]
    commands = [command.get_command(context, name) for name in command.list_commands(context)]
    listed = "\n".join(f"* [`{one.name}`](#linearpatch-{one.name}): {' '.join(one.help.split())}" for one in commands)
    return f"{MADE_BY}\n\n{head}**Commands**:\n\n{listed}\n{details.rstrip()}\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
