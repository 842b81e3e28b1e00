"""Resource names (AIP-122): ``models/demo`` on the wire, ``demo`` everywhere else."""

from __future__ import annotations

import re

from patchbay.errors import ProtocolError

_MODEL = re.compile(r"models/([A-Za-z0-9][A-Za-z0-9._-]*(?:/[A-Za-z0-9][A-Za-z0-9._-]*)?)", re.ASCII)
_MAX_CHARS = 200


def encode_model(name: str) -> str:
    return f"models/{name}"


def decode_model(name: str, field: str) -> str:
    """
    Raises:
        ProtocolError: not of the form ``models/{name}`` (letters, digits, ``.``, ``_``, ``-``; one ``/`` as in hub ids).
    """
    match = _MODEL.fullmatch(name) if len(name) <= _MAX_CHARS else None
    if match is None:
        shown = name if len(name) <= _MAX_CHARS else f"{name[:_MAX_CHARS]}..."
        raise ProtocolError(f"{field}: {shown!r} is not a model's name, such as 'models/demo'", field=field)
    return match.group(1)
