"""Frozen dataclasses with read-only mappings, as pickle and copy take them: with plain dicts in their place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from types import MappingProxyType
from typing import Any


def reduced(value: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """What ``__reduce__`` of a dataclass gives: the class, and its fields as arguments."""
    return _rebuilt, (type(value), {f.name: _plain(getattr(value, f.name)) for f in fields(value)})


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else value


def _rebuilt(kind: Callable[..., Any], given: Mapping[str, Any]) -> Any:
    return kind(**{name: MappingProxyType(v) if isinstance(v, dict) else v for name, v in given.items()})
