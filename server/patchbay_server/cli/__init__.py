"""The `patchbay` command. Only the standard library is imported here; each subcommand imports what it needs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from patchbay._version import __version__
from patchbay.errors import MissingExtraError, PatchbayError

_DESCRIPTION = (
    "Causal experiments inside a large model that runs somewhere else: serve models, look at them, make keys."
)
_TARGET = "server, host:port or URL (default: PATCHBAY_URL, else localhost:9000)"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status. Errors for users are one line on stderr."""
    args = _parser().parse_args(argv)
    try:
        return int(args.run(args))
    except PatchbayError as error:
        print(f"patchbay: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        # A thin install has the client only; anything missing that we ship ourselves is a bug, and shown as one.
        if (error.name or "").partition(".")[0] in ("patchbay", "patchbay_server"):
            raise
        print(f"patchbay: {_missing(error.name or 'a package')}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # `patchbay card demo --sites | head`
        sys.stderr.close()
        return 0
    except KeyboardInterrupt:
        return 130


def _missing(name: str) -> str:
    return f"this needs {name}, which is not installed: pip install 'patchbay[server]'"


def require_server(*names: str) -> None:
    """Say kindly that the server extra is missing.

    Raises:
        MissingExtraError: one of the packages is not installed.
    """
    import importlib.util

    for name in names:
        if importlib.util.find_spec(name) is None:
            raise MissingExtraError(
                f"hosting a model needs the service's packages ({name} is missing): pip install 'patchbay[server]'"
            )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="patchbay", description=_DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"patchbay {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    serve = commands.add_parser("serve", help="host models and stay up until Ctrl-C")
    serve.add_argument(
        "--model", action="append", metavar="SOURCE", help="demo, a Hugging Face hub id, or a folder; may be repeated"
    )
    serve.add_argument("--config", metavar="FILE", help="YAML file (every key: docs/serving.md); flags win over it")
    serve.add_argument("--port", type=int, help="gRPC port (default 9000)")
    serve.add_argument("--host", help="address to listen on (default: all interfaces)")
    serve.add_argument("--plain", action="store_true", help="one process with a plain gRPC server, without Ray")
    serve.add_argument("--insecure", action="store_true", help="ask nobody for a key")
    serve.set_defaults(run=_serve)

    models = commands.add_parser("models", help="list the models of a server")
    _add_target(models)
    models.set_defaults(run=_models)

    card = commands.add_parser("card", help="show a model's widths and sites")
    card.add_argument("model", metavar="MODEL", help="name of the model, as `patchbay models` shows it")
    card.add_argument("--sites", action="store_true", help="list every site, of every layer and module")
    card.add_argument("--proofs", action="store_true", help="say how each site was proved when the model was loaded")
    _add_target(card)
    card.set_defaults(run=_card)

    prove = commands.add_parser(
        "prove", help="load a model here, without serving it, and show what was proved of its sites"
    )
    prove.add_argument("source", metavar="SOURCE", help="demo, a Hugging Face hub id, or a folder")
    prove.add_argument("--dtype", default="auto", help="auto (as stored), float32, bfloat16 or float16")
    prove.add_argument("--device", default="auto", help="auto, or a torch device")
    prove.set_defaults(run=_prove)

    run = commands.add_parser("run", help="run a saved graph and print, or keep, what it gives")
    run.add_argument("graph", metavar="FILE", help="a graph that pb.save_graph wrote")
    run.add_argument("--model", metavar="NAME", help="model to run it on (default: the one it was made for)")
    run.add_argument("--out", metavar="FILE", help="where to put the values: .npz or .safetensors")
    run.add_argument("--show", action="store_true", help="print the graph, and run nothing")
    run.add_argument("--timeout", type=float, default=600.0, metavar="S", help="seconds it may take (default 600)")
    _add_target(run)
    run.set_defaults(run=_run)

    artifacts = commands.add_parser("artifacts", help="what you left on a server: tensors that stay there")
    actions = artifacts.add_subparsers(title="actions", metavar="ACTION", required=True)
    listing = actions.add_parser("list", help="list them")
    put = actions.add_parser("put", help="upload every tensor of a safetensors file")
    put.add_argument("file", metavar="FILE", help="a .safetensors file")
    put.add_argument("--name", default="", metavar="PREFIX", help="before the names of the file's tensors")
    get = actions.add_parser("get", help="fetch one into a file")
    get.add_argument("which", metavar="DIGEST|NAME")
    get.add_argument("file", metavar="FILE", help="a .safetensors or .npz file")
    delete = actions.add_parser("delete", help="remove some; graphs that use them go on")
    delete.add_argument("which", metavar="DIGEST|NAME", nargs="+")
    for action, each in (("list", listing), ("put", put), ("get", get), ("delete", delete)):
        _add_target(each)
        each.set_defaults(run=_artifacts, action=action)

    keys = commands.add_parser("keys", help="make, list and revoke API keys on the server's machine")
    keys.add_argument("--file", metavar="FILE", help="key file (default: as configured)")
    keys.add_argument("--config", metavar="FILE", help="configuration that names the key file")
    actions = keys.add_subparsers(title="actions", metavar="ACTION", required=True)
    create = actions.add_parser("create", help="make a key and print it, this once")
    create.add_argument("account", help="whose key it is")
    create.set_defaults(run=_keys, action="create")
    listing = actions.add_parser("list", help="list the keys (never the keys themselves)")
    listing.set_defaults(run=_keys, action="list")
    revoke = actions.add_parser("revoke", help="forget a key; servers notice within seconds")
    revoke.add_argument("name", help="id of one key, or an account for all of its keys")
    revoke.set_defaults(run=_keys, action="revoke")

    doctor = commands.add_parser("doctor", help="check this installation, and say how to mend what is wrong")
    doctor.add_argument("--config", metavar="FILE", help="configuration to check")
    _add_target(doctor)
    doctor.set_defaults(run=_doctor)
    return parser


def _add_target(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", "--server", metavar="TARGET", help=_TARGET)
    parser.add_argument(
        "--api-key", metavar="KEY", help="key (default: PATCHBAY_API_KEY, else this machine's key file)"
    )


def _serve(args: argparse.Namespace) -> int:
    from patchbay_server.cli.serve import run

    return run(args)


def _models(args: argparse.Namespace) -> int:
    from patchbay_server.cli.show import models

    return models(args)


def _card(args: argparse.Namespace) -> int:
    from patchbay_server.cli.show import card

    return card(args)


def _prove(args: argparse.Namespace) -> int:
    require_server("torch", "transformers")
    from patchbay_server.cli.show import prove

    return prove(args)


def _run(args: argparse.Namespace) -> int:
    from patchbay_server.cli.run import run

    return run(args)


def _artifacts(args: argparse.Namespace) -> int:
    from patchbay_server.cli.artifacts import run

    return run(args)


def _keys(args: argparse.Namespace) -> int:
    from patchbay_server.cli.keys import run

    return run(args)


def _doctor(args: argparse.Namespace) -> int:
    from patchbay_server.cli.doctor import run

    return run(args)
