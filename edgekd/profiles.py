"""Devices by name or by file. One device is one TOML: kind, facts with their sources, identity, settings.

```toml
extends = "raspberry-pi-5"   # facts and identity of a device that edgekd knows; or: kind = "ssh"
[settings]
host = "pi5.local"
```
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from edgekd import plugins
from edgekd.errors import UsageError
from edgekd.measurement import Profile
from edgekd.protocols import Device

__all__ = ["device_names", "device_of", "load_device", "load_profile", "own_folder"]

TABLES = ("facts", "sources", "identity", "settings")
KEYS = ("kind", "extends", *TABLES)


def own_folder() -> Path:
    """Where a user's own devices are found by name: ``EDGEKD_DEVICES``, by default ``~/.config/edgekd/devices``."""
    return Path(os.environ.get("EDGEKD_DEVICES") or Path.home() / ".config" / "edgekd" / "devices")


def device_names() -> tuple[str, ...]:
    """Names of all devices: edgekd's own and the user's. ``load_profile`` also takes a path."""
    built_in = {Path(entry.name).stem for entry in files("edgekd.devices").iterdir() if entry.name.endswith(".toml")}
    return tuple(sorted(built_in | {path.stem for path in own_folder().glob("*.toml")}))


def load_device(name: str) -> Device:
    """The device of a profile, by name or path.

    Raises:
        UsageError: There is no such device, or its file is wrong.
    """
    return device_of(load_profile(name))


def device_of(profile: Profile) -> Device:
    """The device that a profile tells of; nothing is touched yet.

    Raises:
        UsageError: There is no such kind, or a setting that the kind does not know.
    """
    kind = plugins.load_kind(profile.kind)
    try:
        settings = kind.settings.model_validate(profile.settings)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(("settings", *map(str, first["loc"])))
        known = ", ".join(kind.settings.model_fields) or "none"
        raise UsageError(f"device {profile.name}: {where}: {first['msg']}; {profile.kind} has {known}") from None
    return kind(profile, settings)


def load_profile(name: str) -> Profile:
    """A device's TOML, by name or path; see the top of this file.

    A name is looked up in the user's own folder first, so that one's own device may bear the name of its model.

    Raises:
        UsageError: There is no such device, or its file is wrong.
    """
    if name.endswith(".toml"):
        path = Path(name)
        if not path.is_file():
            raise UsageError(f"no device file {name}")
        return _profile(path.stem, path.read_text(encoding="utf-8"), name, ())
    return _named(name, ())


def _named(name: str, seen: tuple[str, ...]) -> Profile:
    own, built_in = own_folder() / f"{name}.toml", files("edgekd.devices") / f"{name}.toml"
    places = [place for place in (own, built_in) if _is_plain(name)]
    if name in seen:  # one's own file extends the built-in one of the same name
        places = places[1:]
    for place in places:
        if place.is_file():
            return _profile(name, place.read_text(encoding="utf-8"), str(place), (*seen, name))
    raise UsageError(f"no device {name!r}; there are {', '.join(device_names())}, or the path of a .toml")


def _is_plain(name: str) -> bool:
    return bool(name) and all(letter.isalnum() or letter in "-_." for letter in name) and not name.startswith(".")


def _profile(name: str, text: str, where: str, seen: tuple[str, ...]) -> Profile:
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{where} is no TOML: {error}") from None
    unknown = [key for key in table if key not in KEYS]
    if unknown:
        raise UsageError(f"{where}: nothing is called {unknown[0]!r}; a device has {', '.join(KEYS)}")
    if ("kind" in table) == ("extends" in table):
        raise UsageError(f"{where}: a device has either a kind or another device that it extends")
    base = _named(table["extends"], seen) if "extends" in table else Profile(name, table["kind"])
    tables: dict[str, Mapping[str, Any]] = {key: {**getattr(base, key), **table.get(key, {})} for key in TABLES}
    texts = {key: {word: str(value) for word, value in tables[key].items()} for key in TABLES[:3]}
    return Profile(name, base.kind, **texts, settings=dict(tables["settings"]))
