"""Trees of values: tuples, lists and dicts taken apart into leaves, and put together again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from patchbay.errors import GraphError
from patchbay.places import here

#: Stands for a leaf in the structure of a tree.
_LEAF = "*"


def flatten(tree: object) -> tuple[list[Any], Any]:
    """The leaves of a tree, and its structure; None holds none."""
    leaves: list[Any] = []

    def walk(value: object) -> Any:
        if value is None:
            return None
        if isinstance(value, Mapping):
            return {key: walk(value[key]) for key in value}
        # Lists of numbers are arrays, as everywhere else.
        if isinstance(value, (list, tuple)) and not _is_numbers(value):
            parts = [walk(v) for v in value]
            return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
        leaves.append(value)
        return _LEAF

    return leaves, walk(tree)


def _is_numbers(value: Sequence[object]) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, (bool, int, float)) for v in value)


def unflatten(tree: Any, leaves: Sequence[Any]) -> Any:
    """The tree of that structure with these leaves."""
    rest = iter(leaves)

    def build(node: Any) -> Any:
        if node is None:
            return None
        if isinstance(node, dict):
            return {key: build(value) for key, value in node.items()}
        if isinstance(node, (list, tuple)):
            parts = [build(v) for v in node]
            return type(node)(*parts) if hasattr(node, "_fields") else type(node)(parts)
        return next(rest)

    return build(tree)


def flatten_like(what: str, value: object, tree: Any) -> list[Any]:
    """The leaves of `value`, which must have the structure `tree`, in that structure's order."""
    leaves: list[Any] = []

    def walk(found: Any, node: Any, path: str) -> None:
        if node == _LEAF and isinstance(node, str):
            if found is None or isinstance(found, (tuple, Mapping)):
                raise GraphError(
                    f"{what}{path} must be a value, as it was before; got {kind_of(found)}", location=here()
                )
            leaves.append(found)
        elif node is None:
            if found is not None:
                raise GraphError(f"{what}{path} was None before; got {kind_of(found)}", location=here())
        elif isinstance(node, dict):
            if not isinstance(found, Mapping) or set(found) != set(node):
                raise GraphError(
                    f"{what}{path} must be a dict with the keys {list(node)}; got {_describe(found)}", location=here()
                )
            for key in node:
                walk(found[key], node[key], f"{path}[{key!r}]")
        elif not isinstance(found, (list, tuple)) or len(found) != len(node):
            raise GraphError(
                f"{what}{path} must be a {type(node).__name__} of {len(node)}; got {_describe(found)}", location=here()
            )
        else:
            for i, part in enumerate(node):
                walk(found[i], part, f"{path}[{i}]")

    walk(value, tree, "")
    return leaves


def _describe(value: object) -> str:
    if isinstance(value, Mapping):
        return f"a dict with the keys {list(value)}"
    return f"a {type(value).__name__} of {len(value)}" if isinstance(value, (list, tuple)) else kind_of(value)


def kind_of(value: object) -> str:
    """What a value is, in a word or two."""
    return f"a tuple of {len(value)}" if isinstance(value, tuple) else f"a {type(value).__name__}"
