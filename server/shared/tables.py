"""Converts nested tables, as in TOML and JSON, to dotted names and back: {"ppo": {"steps": 3}} is {"ppo.steps": 3}."""

from collections.abc import Mapping
from typing import Any


def flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values by dotted name; an empty table is a value."""
    found: dict[str, Any] = {}
    for name, value in table.items():
        below = flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {}
        found |= below or {f"{prefix}{name}": value}
    return found


def nest(values: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    table: dict[str, Any] = {}
    for name, value in values.items():
        *path, last = name.split(".")
        below = table
        for part in path:
            below = below.setdefault(part, {})
        below[last] = value
    return table
