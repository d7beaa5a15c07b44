"""Presets and cards: the named TOML tables and Markdown pages of the root folders.

They are looked for in the user's workspace first, then among those that ship with fedkd.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from fedkd.errors import ConfigError, unknown

FOLDERS = {"strategy": "strategies", "clients": "clients", "privacy": "privacy"}


def shared(folder: str) -> Path:
    """Return the folder of that name that ships with fedkd (installed, or in a checkout)."""
    installed = Path(__file__).parent / "_share" / folder
    return installed if installed.is_dir() else Path(__file__).parent.parent / folder


def places(kind: str, workspace: Path | None) -> list[Path]:
    """Return the folders in which presets and cards of a kind are looked for, in order."""
    folder = FOLDERS[kind]
    own = [workspace / folder] if workspace else []
    return [place for place in (*own, shared(folder)) if place.is_dir()]


def preset_names(kind: str, workspace: Path | None = None) -> list[str]:
    """Return the names of all presets of a kind."""
    return sorted({f.stem for place in places(kind, workspace) for f in place.glob("*.toml")})


def preset(kind: str, name: str, workspace: Path | None = None) -> dict[str, Any] | None:
    """Return the table of a preset, or None where a strategy has no preset of that name.

    Raises:
        ConfigError: the preset does not exist (kinds other than strategy) or is not TOML.
    """
    if isinstance(name, str) and name and not set(name) & set("/\\") and not name.startswith("."):
        for place in places(kind, workspace):
            file = place / f"{name}.toml"
            if file.is_file():
                try:
                    return tomllib.loads(file.read_text(encoding="utf-8"))
                except tomllib.TOMLDecodeError as error:
                    raise ConfigError(f"{file} is not valid TOML: {error}") from None
    if kind == "strategy":
        return None
    raise unknown(f"{kind} preset", str(name), preset_names(kind, workspace))


def card(kind: str, name: str, workspace: Path | None = None) -> str:
    """Return the Markdown card of a component, or an empty string."""
    for place in places(kind, workspace):
        file = place / f"{name}.md"
        if file.is_file():
            return file.read_text(encoding="utf-8")
    return ""
