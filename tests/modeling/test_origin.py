"""What a model says of its origin and its terms, and cards and metadata that say nothing one can use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from linearpatch_kernels.modeling.loading import terms_among
from linearpatch_kernels.modeling.origin import Origin, origin_of_directory, origin_of_gguf


def card(folder: Path, content: str | bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def test_a_card_is_read(tmp_path: Path) -> None:
    told = "---\nlicense: mit\nlanguage: en\nbase_model:\n- a/b\n- c/d.e\n---\n# Any\n"
    found = origin_of_directory(card(tmp_path, told))
    assert found == Origin(base_models=("a/b", "c/d.e"), license="mit", languages=("en",))
    assert found.to_dict() == {"base_models": ("a/b", "c/d.e"), "license": "mit", "languages": ("en",)}
    assert origin_of_directory(tmp_path, "owner/name").repository == "owner/name"


@pytest.mark.parametrize(
    "content",
    [
        "# no front matter",
        "---\n- a list\n---\n",
        "---\nlicense: [unclosed\n---\n",
        "---\nlicense: 5\nlanguage: {en: 1}\nbase_model: /home/someone/model\n---\n",
        "---\nlanguage: no\nlicense:\n  name: mit\n---\n",
        '---\nlicense: "two\\nlines"\nbase_model: https://example.org/x\n---\n',
        "---\nlicense: " + "x" * 301 + "\n---\n",
        "---\nlicense: !!python/object/apply:os.system ['true']\n---\n",
        b"---\nlicense: \xff\n---\n",
    ],
    ids=["none", "list", "broken", "kinds", "norwegian", "lines", "long", "code", "bytes"],
)
def test_what_cannot_be_used_says_nothing(content: str | bytes, tmp_path: Path) -> None:
    assert origin_of_directory(card(tmp_path, content)) == Origin()


def test_without_a_card_or_a_directory(tmp_path: Path) -> None:
    assert origin_of_directory(tmp_path) == Origin()
    assert origin_of_directory(None, "owner/name") == Origin("owner/name")


@pytest.mark.parametrize(
    ("path", "repository"),
    [
        (f"models--owner--the-name/snapshots/{'0' * 40}", "owner/the-name"),
        (f"models--owner--the-name/other/{'0' * 40}", ""),
        ("models--owner--the-name/snapshots/main", ""),
        (f"datasets--owner--name/snapshots/{'0' * 40}", ""),
        (f"models--gpt2/snapshots/{'0' * 40}", ""),
    ],
)
def test_a_directory_of_the_hubs_cache_tells_its_repository(path: str, repository: str, tmp_path: Path) -> None:
    (tmp_path / path).mkdir(parents=True)
    assert origin_of_directory(tmp_path / path).repository == repository


def test_the_metadata_of_a_gguf_is_read() -> None:
    metadata = {
        "general.name": "A Name",
        "general.repo_url": "https://huggingface.co/owner/own/",
        "general.license": "other",
        "general.license.name": "gemma",
        "general.license.link": "https://ai.google.dev/gemma/terms",
        "general.languages": ["en", "de"],
        "general.base_model.count": 3,
        "general.base_model.0.repo_url": "https://huggingface.co/a/b",
        "general.base_model.1.repo_url": "https://example.org/c/d",
        "general.base_model.2.name": "without an address",
    }
    assert origin_of_gguf(metadata) == Origin(
        "owner/own", "A Name", ("a/b",), "other", "gemma", "https://ai.google.dev/gemma/terms", ("en", "de")
    )


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"general.license": 5, "general.name": ["x"], "general.languages": 7},
        {"general.base_model.count": 1 << 60},
        {"general.base_model.count": "2", "general.base_model.0.repo_url": 5},
        {"general.url": "https://huggingface.co/only-an-owner", "general.name": "two\nlines"},
    ],
)
def test_metadata_that_says_nothing(metadata: dict[str, Any]) -> None:
    assert origin_of_gguf(metadata) == Origin()


def test_which_files_are_terms() -> None:
    names = ["LICENSE", "licence.txt", "NOTICE", "USE_POLICY.md", "COPYING", "tokenizer.model", "vocab.json"]
    assert terms_among(names) == names[:5]
