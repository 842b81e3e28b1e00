"""Resource names (AIP-122): ``models/demo`` on the wire, ``demo`` everywhere else."""

from __future__ import annotations

import re

from patchbay.errors import InvalidRequestError, ProtocolError

_MODEL = re.compile(r"models/([A-Za-z0-9][A-Za-z0-9._-]*(?:/[A-Za-z0-9][A-Za-z0-9._-]*)?)", re.ASCII)
_MAX_CHARS = 200


def encode_model(name: str) -> str:
    """
    Raises:
        InvalidRequestError: no model can be called so.
    """
    resource = f"models/{name}"
    if len(resource) > _MAX_CHARS or _MODEL.fullmatch(resource) is None:
        raise InvalidRequestError(
            f"{name!r} cannot be a model's name: letters, digits, '.', '_', '-', and one '/' as in hub ids",
            reason="INVALID_MODEL_NAME",
        )
    return resource


def decode_model(name: str, field: str) -> str:
    """
    Raises:
        ProtocolError: not ``models/`` and a name of letters, digits, ``.``, ``_``, ``-``, and one ``/`` as in hub ids.
    """
    match = _MODEL.fullmatch(name) if len(name) <= _MAX_CHARS else None
    if match is None:
        shown = name if len(name) <= _MAX_CHARS else f"{name[:_MAX_CHARS]}..."
        raise ProtocolError(f"{field}: {shown!r} is not a model's name, such as 'models/demo'", field=field)
    return match.group(1)
