"""Somebody else's words, as letters: in a line, and in Markdown.

Names of models, files, fits and tasks, prompts and what a model writes may look like markup, and never are.
"""

from __future__ import annotations

import re
import unicodedata
import urllib.parse


class Markdown(str):
    """Text that is Markdown already."""


# What GitHub's Markdown, its mathematics or HTML would read as more than letters, wherever it stands in a line: the
# bracket that would end the text of a link, and the colon or dot of an address, among others.
_MARKUP = re.compile(r"[\\`*_<>|~$&]|\](?=[(\[:])|:(?=//)|(?<=www)\.")

# At the start of a line: headings, lists, tasks, rules.
_STARTS = re.compile(r"^([-+#=]|\[(?=[ xX]\])|\d{1,9}(?=[.)](\s|$)))")


def letters(text: str) -> str:
    """One line of text as it can be written down: no line ends, control characters or halves of letters.

    (A file name may hold anything; what is not UTF-8 in it comes as lone surrogates.)
    """
    whole = text.encode("utf-8", "replace").decode("utf-8")
    return " ".join("".join(" " if unicodedata.category(c) in ("Cc", "Zl", "Zp") else c for c in whole).split())


def escaped(text: str) -> str:
    """Plain text, in Markdown."""
    return text if isinstance(text, Markdown) else _MARKUP.sub(r"\\\g<0>", letters(text))


def line(text: str) -> str:
    """Plain text that a line of Markdown, or what follows its list marker, begins with."""
    return _STARTS.sub(lambda found: found[0] + "\\" if found[0].isdigit() else "\\" + found[0], escaped(text))


def code(text: str) -> str:
    """A file's name, as code where it can be told as code within a table."""
    name = letters(text)
    return name if any(c in name for c in "`|\\") else Markdown(f"`{name}`")


def fenced(text: str, language: str) -> str:
    """A block of code, '' for none, in a fence that nothing in it closes."""
    runs = [len(run) for run in re.findall("`+", text)]
    fence = "`" * max(3, 1 + max(runs, default=0))
    whole = text.encode("utf-8", "replace").decode("utf-8").strip()
    return f"{fence}{language}\n{whole}\n{fence}" if whole else ""


def picture(name: str, caption: str) -> str:
    alternative = re.sub(r"(?<!\\)[\[\]]", r"\\\g<0>", escaped(caption))
    return f"![{alternative}]({urllib.parse.quote(name)})\n\n*{escaped(caption)}*"
