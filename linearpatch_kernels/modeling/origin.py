"""What a model says of where it comes from and of its terms: in its card's front matter, or in a GGUF file's metadata.

Nothing is concluded from a licence's text, a name or a path. Whatever is missing or of another kind is left out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.repocard import metadata_load

CARD = "README.md"
"""The file that a model's card is."""

_HUB = "https://huggingface.co/"
_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*")
# Of a name or an address in a card that somebody else wrote.
_LONGEST = 300
_MOST = 100


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a model comes from, as far as it says so itself; empty where it does not.

    Attributes:
        repository: the model's own on the hub, ``owner/name``.
        title: what a GGUF file calls its model.
        base_models: repositories that it was itself made from.
        license: an identifier such as ``apache-2.0``, or ``other``; license_name, license_link: of another licence.
        languages: as the card names them.
    """

    repository: str = ""
    title: str = ""
    base_models: tuple[str, ...] = ()
    license: str = ""
    license_name: str = ""
    license_link: str = ""
    languages: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """What is known of it, as JSON values."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value}


def origin_of_directory(directory: Path | None, repository: str = "") -> Origin:
    """What the card in a model's directory says; a card that cannot be read says nothing.

    Args:
        directory: None: there is none.
        repository: of the model, where it is known; a directory in the hub's cache tells by its path.
    """
    if directory is None:
        return Origin(repository)
    told: Any = None
    # Somebody else's file: no text, no YAML, or a front matter that is none.
    with contextlib.suppress(Exception):
        told = metadata_load(directory / CARD)
    about = told if isinstance(told, Mapping) else {}
    return Origin(
        repository or _repository_of_snapshot(directory),
        base_models=tuple(name for name in _texts(about.get("base_model")) if _REPOSITORY.fullmatch(name)),
        license=_text(about.get("license")),
        license_name=_text(about.get("license_name")),
        license_link=_text(about.get("license_link")),
        languages=_texts(about.get("language")),
    )


def origin_of_gguf(metadata: Mapping[str, Any]) -> Origin:
    """What the metadata of a GGUF file says."""
    count = metadata.get("general.base_model.count")
    bases = range(min(count, _MOST) if isinstance(count, int) else 0)
    own = ("general.repo_url", "general.url", "general.source.repo_url", "general.source.url")
    return Origin(
        repository=next(filter(None, (_repository_at(metadata.get(key)) for key in own)), ""),
        title=_text(metadata.get("general.name")),
        base_models=tuple(
            filter(None, (_repository_at(metadata.get(f"general.base_model.{number}.repo_url")) for number in bases))
        ),
        license=_text(metadata.get("general.license")),
        license_name=_text(metadata.get("general.license.name")),
        license_link=_text(metadata.get("general.license.link")),
        languages=_texts(metadata.get("general.languages")),
    )


def _text(value: Any) -> str:
    """One line of text; '' for anything else."""
    line = value.strip() if isinstance(value, str) else ""
    return line if line.isprintable() and len(line) <= _LONGEST else ""


def _texts(value: Any) -> tuple[str, ...]:
    """A text or several."""
    several = value if isinstance(value, list | tuple) else [value]
    return tuple(filter(None, map(_text, several[:_MOST])))


def _repository_at(address: Any) -> str:
    """``owner/name`` of an address on the hub; '' for any other."""
    name = _text(address).removesuffix("/")
    name = name.removeprefix(_HUB) if name.startswith(_HUB) else ""
    return name if _REPOSITORY.fullmatch(name) else ""


def _repository_of_snapshot(directory: Path) -> str:
    """Of a directory that the hub's library made: ``models--owner--name/snapshots/<commit>``."""
    with contextlib.suppress(OSError):
        commit, snapshots, repository = [*directory.resolve().parts[::-1], "", "", ""][:3]
        owner, _, name = repository.removeprefix("models--").partition("--")
        named = f"{owner}/{name}"
        if (
            snapshots == "snapshots"
            and re.fullmatch(r"[0-9a-f]{40}", commit)
            and repository.startswith("models--")
            and _REPOSITORY.fullmatch(named)
        ):
            return named
    return ""
