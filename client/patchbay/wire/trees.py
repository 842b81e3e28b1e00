"""Trees of results (lists, dicts, tuples, strings, numbers, None) as msgpack, with every limit set.

Left to its defaults msgpack turns 10 MB of input into 600 MB of objects and accepts extension types. Here a tree is at
most a megabyte, 32 deep, holds no bytes and no extensions. A tuple is written as a map with the one key
`TUPLE_KEY`, because msgpack knows only one kind of sequence.
"""

from __future__ import annotations

from typing import Any, TypeAlias

from patchbay.errors import ProtocolError
from patchbay.wire.bounds import MAX_TREE_BYTES, MAX_TREE_DEPTH

Tree: TypeAlias = "None | bool | int | float | str | list[Tree] | tuple[Tree, ...] | dict[str, Tree]"

TUPLE_KEY = "\x00tuple"


def dumps(tree: Tree) -> bytes:
    """
    Raises:
        ProtocolError: something that a tree does not hold, or a tree too deep or too large.
    """
    import msgpack

    try:
        data: bytes = msgpack.packb(_lower(tree, 0), use_bin_type=True, strict_types=True)
    except (ValueError, OverflowError, TypeError) as error:
        if isinstance(error, ProtocolError):
            raise
        raise ProtocolError(f"a tree cannot hold this: {error}") from None
    if len(data) > MAX_TREE_BYTES:
        raise ProtocolError(f"a tree of {len(data)} bytes; at most {MAX_TREE_BYTES}")
    return data


def loads(data: bytes) -> Tree:
    """
    Raises:
        ProtocolError: not a tree, or one beyond the limits.
    """
    import msgpack

    if len(data) > MAX_TREE_BYTES:
        raise ProtocolError(f"a tree of {len(data)} bytes; at most {MAX_TREE_BYTES}")
    try:
        raw = msgpack.unpackb(
            data,
            raw=False,
            strict_map_key=True,
            max_str_len=MAX_TREE_BYTES,
            max_bin_len=0,
            max_array_len=len(data),
            max_map_len=len(data),
            max_ext_len=0,
            ext_hook=_refuse_extension,
            timestamp=0,
        )
    except ProtocolError:
        raise
    except (ValueError, TypeError, msgpack.exceptions.UnpackException, RecursionError) as error:
        raise ProtocolError(f"not a msgpack tree ({type(error).__name__})") from None
    return _raise(raw, 0)


def _refuse_extension(code: int, data: bytes) -> object:
    del data
    raise ProtocolError(f"msgpack extension type {code} is not allowed")


def _lower(tree: Tree, depth: int) -> object:
    if depth > MAX_TREE_DEPTH:
        raise ProtocolError(f"a tree nests more than {MAX_TREE_DEPTH} deep")
    if isinstance(tree, tuple):
        return {TUPLE_KEY: [_lower(item, depth + 1) for item in tree]}
    if isinstance(tree, list):
        return [_lower(item, depth + 1) for item in tree]
    if isinstance(tree, dict):
        if TUPLE_KEY in tree or not all(isinstance(key, str) for key in tree):
            raise ProtocolError("the keys of a tree's dicts are strings")
        return {key: _lower(item, depth + 1) for key, item in tree.items()}
    if tree is None or isinstance(tree, (bool, int, float, str)):
        return tree
    raise ProtocolError(f"a tree cannot hold a {type(tree).__name__}")


def _raise(raw: Any, depth: int) -> Tree:
    if depth > MAX_TREE_DEPTH:
        raise ProtocolError(f"a tree nests more than {MAX_TREE_DEPTH} deep")
    if isinstance(raw, list):
        return [_raise(item, depth + 1) for item in raw]
    if isinstance(raw, dict):
        if TUPLE_KEY in raw:
            items = raw[TUPLE_KEY]
            if len(raw) != 1 or not isinstance(items, list):
                raise ProtocolError("a tuple is a map with one key and a list")
            return tuple(_raise(item, depth + 1) for item in items)
        if not all(isinstance(key, str) for key in raw):
            raise ProtocolError("the keys of a tree's dicts are strings")
        return {key: _raise(item, depth + 1) for key, item in raw.items()}
    if raw is None or isinstance(raw, (bool, int, float, str)):
        return raw
    raise ProtocolError(f"a tree cannot hold a {type(raw).__name__}")
