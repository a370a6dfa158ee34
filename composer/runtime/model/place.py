"""Where the programs look for models: the bundle's own folder, the Hugging Face cache, or nowhere but here."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .. import PREFIX, environment

_YES = ("1", "on", "yes", "true")  # what huggingface_hub takes for yes


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where to look: the bundle's folder, a folder to write to (None: there is none), and the environment."""

    prefix: Path
    cache: Path | None
    environ: Mapping[str, str]

    @property
    def offline(self) -> bool:
        """Whether downloads are ruled out."""
        return (self.environ.get("HF_HUB_OFFLINE") or self.environ.get("TRANSFORMERS_OFFLINE") or "").lower() in _YES

    @property
    def online(self) -> bool:
        """Whether HF_HUB_OFFLINE says no in so many words: then the hub is asked, whatever the cache has."""
        return bool(self.environ.get("HF_HUB_OFFLINE")) and not self.offline

    @property
    def bundled(self) -> Path:
        """The bundle's models, laid out as a Hugging Face cache."""
        return self.prefix / "share" / "models" / "hub"

    @property
    def hub_cache(self) -> Path:
        """The Hugging Face cache, as huggingface_hub finds it (constants.py)."""
        environ = self.environ
        base = environ.get("XDG_CACHE_HOME") or "~/.cache"
        home = environ.get("HF_HOME") or f"{base}/huggingface"
        found = environ.get("HF_HUB_CACHE") or environ.get("HUGGINGFACE_HUB_CACHE") or f"{home}/hub"
        return Path(os.path.expandvars(os.path.expanduser(found)))  # noqa: PTH111  # pathlib raises without a home


def place_here() -> Place:
    """The bundle that this module is part of, and this process's environment."""
    cache = environment.cache_folder()
    return Place(prefix=Path(PREFIX), cache=Path(cache) if cache else None, environ=os.environ)
