"""The optional packages behind the plots, imported at first use, with an error that says how to get them."""

from __future__ import annotations

import importlib
from typing import Any

from patchbay.errors import MissingExtraError


def require(module: str, what: str) -> Any:
    """The module called `module`, imported now.

    Raises:
        MissingExtraError: it is not installed; the message names the extra.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as e:
        package = module.partition(".")[0]
        if e.name is None or e.name.partition(".")[0] != package:
            raise
        raise MissingExtraError(
            f"{what} needs {package}, which is not installed: pip install 'patchbay[plots]'", name=package
        ) from e
