"""`patchbay run`: a saved graph, run again."""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path
from typing import Any

from patchbay.client import connect
from patchbay.errors import InvalidRequestError, PatchbayError
from patchbay.results import Results
from patchbay.saving import SavedGraph, load_graph, save_results
from patchbay.tracing import Artifact
from patchbay_server.cli.text import table

#: Arrays of more elements are described, not printed.
_SHOWN_ELEMENTS = 8


def run(args: argparse.Namespace) -> int:
    """Run a graph file and print or keep its values.

    Raises:
        PatchbayError: the file, the model or the server will not do; nothing is written then.
    """
    graph = _read(Path(args.graph))
    if args.show:
        print(graph)
        return 0
    out = None if args.out is None else Path(args.out)
    if out is not None and out.suffix not in (".npz", ".safetensors"):
        raise InvalidRequestError(f"--out takes a .npz or .safetensors file, not {out.name!r}")
    name = args.model or graph.model
    if not name:
        raise InvalidRequestError("the file does not say which model the graph is for; give --model")
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        with connect(args.url, api_key=args.api_key) as client:
            results = client.model(name).run(graph, timeout_s=args.timeout)
    for note in notes:
        print(f"patchbay: {note.message}", file=sys.stderr)
    print(table([(key, *_describe(value)) for key, value in results.items()], head=("VALUE", "SHAPE", "CONTENT")))
    _say(results)
    if out is not None:
        try:
            save_results({k: v for k, v in results.items() if not isinstance(v, Artifact)}, out)
        except OSError as error:
            raise PatchbayError(f"cannot write {out}: {error.strerror}") from None
        print(f"saved to {out}")
    return 0


def _read(path: Path) -> SavedGraph:
    try:
        return load_graph(path)
    except OSError as error:
        raise PatchbayError(f"cannot read {path}: {error.strerror}") from None


def _describe(value: Any) -> tuple[str, str]:
    shape = f"{value.dtype}{list(value.shape)}"
    if isinstance(value, Artifact):
        return shape, f"stays on the server as {value.digest}"
    if value.size > _SHOWN_ELEMENTS:
        return shape, "..."
    return shape, str(value.tolist())


def _say(results: Results) -> None:
    if results.nonfinite:
        print(f"not finite (NaN or infinity): {', '.join(results.nonfinite)}")
    print(results.usage)
