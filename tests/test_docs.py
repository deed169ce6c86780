"""The pages: links lead somewhere, the README is short and its Python runs, no environment variable is left out."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from markdown_it import MarkdownIt  # comes with rich
from markdown_it.token import Token

from linearpatch_kernels.modeling.saving import save_checkpoint
from tests.support.tiny import VOCABULARY, tiny_model, tiny_tokenizer

ROOT = Path(__file__).parent.parent
FOLDERS = ("docs", "benchmarks", "examples")
PAGES = [ROOT / "README.md", *(page for folder in FOLDERS for page in sorted((ROOT / folder).rglob("*.md")))]
ADDRESS = re.compile(r"[a-z]+:", re.IGNORECASE)


@cache
def parsed(page: Path) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8"))


def links(page: Path) -> Iterator[str]:
    """What the page's links and pictures point to; what stands in a block of code is none."""
    for block in parsed(page):
        for token in block.children or ():
            target = token.attrGet("href") or token.attrGet("src")
            if target:
                yield str(target)


def headings(page: Path) -> set[str]:
    """The anchors that GitHub gives the page's headings."""
    found: list[str] = []
    for opening, text in zip(parsed(page), parsed(page)[1:], strict=False):
        if opening.type == "heading_open":
            shown = "".join(token.content for token in text.children or ())
            anchor = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
            again = sum(re.fullmatch(rf"{re.escape(anchor)}(-\d+)?", one) is not None for one in found)
            found.append(f"{anchor}-{again}" if again else anchor)
    return set(found)


def lost(page: Path) -> list[str]:
    """The page's relative links that lead nowhere."""
    wrong = []
    for link in links(page):
        if ADDRESS.match(link):
            continue
        path, _, anchor = unquote(link).partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in headings(target)):
            wrong.append(link)
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    assert lost(page) == []


def test_a_link_that_leads_nowhere_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# `a` to B: 1.5x\n\n[good](#a-to-b-15x) [web](https://example.org/none.md#x) [bad](#b) ![bad](none.png)\n\n"
        "| a |\n|---|\n| [bad](none.md) [good](page.md#a-to-b-15x) [bad](page.md#c) |\n\n```\n[code](none.md)\n```\n"
    )
    assert lost(page) == ["#b", "none.png", "none.md", "page.md#c"]


def test_every_page_is_in_the_list_of_pages() -> None:
    listed = ROOT / "docs" / "README.md"
    named = {(listed.parent / link.partition("#")[0]).resolve() for link in links(listed)}
    assert [page for page in PAGES[1:] if page != listed and page not in named] == []


def test_the_readme_stays_short() -> None:
    text = (ROOT / "README.md").read_bytes()
    assert len(text.splitlines()) <= 150
    assert len(text) <= 9000


def test_the_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """First what makes a checkpoint, then what loads it: the README has them the other way round."""
    monkeypatch.chdir(tmp_path)
    model = tiny_model("llama", layers=9, hidden_size=64, head_dim=16, max_position_embeddings=512)
    save_checkpoint(model, tiny_tokenizer(), "MODEL")
    words = random.Random(0)
    Path("my.txt").write_text(" ".join(str(words.randrange(VOCABULARY - 4)) for _ in range(161 * 512)))
    blocks = [token.content for token in parsed(ROOT / "README.md") if token.type == "fence" and token.info == "python"]
    loading, making = blocks
    exec(making, {})
    names: dict[str, Any] = {}
    exec(loading, names)
    assert names["model"].config.num_hidden_layers == 3
    assert Path("DIR/linearpatch/plan.json").is_file()


def test_every_environment_variable_is_described() -> None:
    """Those that the package and its kernels read."""
    python = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "linearpatch_kernels").rglob("*.py"))
    kernels = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "csrc").rglob("*.cpp"))
    read = set(re.findall(r"\"(LINEARPATCH_[A-Z_]+)\"", python)) | set(re.findall(r"getenv\(\"(\w+)\"\)", kernels))
    described = (ROOT / "docs/reference/environment.md").read_text(encoding="utf-8")
    assert {"LINEARPATCH_BACKEND", "LINEARPATCH_CPU_ISA"} <= read
    assert [name for name in sorted(read) if f"`{name}`" not in described] == []
