"""`patchbay serve`: host models until Ctrl-C."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from patchbay._version import __version__
from patchbay_server.cli import require_server
from patchbay_server.cli.text import ProgressLine

_SNIPPET = """
  import patchbay as pb
  client = pb.connect("localhost:{port}")
  model = client.model("{model}")
  with model.trace("{prompt}") as run:
      top = run.logits[:, -1].topk(5).indices.save()
  print(top.value)  # the five likeliest next tokens
"""


def run(args: argparse.Namespace) -> int:
    """Serve with the configuration and the flags that win over it; returns the exit status."""
    require_server("pydantic", "yaml", "torch", "transformers", "grpc_health")
    from patchbay_server.config import Config

    config = Config.load(args.config, overrides=_overrides(args))
    progress = ProgressLine(sys.stderr)
    try:
        if args.plain:
            return _plain(config, progress)
        return _on_ray(config, progress)
    finally:
        progress.end()


def _overrides(args: argparse.Namespace) -> dict[str, Any]:
    overrides: dict[str, Any] = {}
    if args.model:
        overrides["models"] = [{"source": source} for source in args.model]
    if args.port is not None:
        overrides["port"] = args.port
    if args.host is not None:
        overrides["host"] = args.host
    if args.insecure:
        overrides["insecure"] = True
    return overrides


def _on_ray(config: Any, progress: ProgressLine) -> int:
    require_server("ray", "grpc_reflection")
    from patchbay_server import main

    launch = main.serve_on_ray(
        config,
        progress=progress.say,
        ready=lambda logs: _announce(config, config.port, progress, "Ray Serve", logs),
    )
    progress.end()
    if launch.failure is None:
        print("stopped", file=sys.stderr)
        return 0
    log = f"\n  the log of this run: {launch.log}" if launch.log is not None else ""
    print(f"patchbay: {launch.failure}{log}", file=sys.stderr)
    return 1


def _plain(config: Any, progress: ProgressLine) -> int:
    from patchbay_server import main
    from patchbay_server.serving.replica import set_up_logging

    set_up_logging(config)
    main.serve_plain(
        config, progress=progress.say, ready=lambda port: _announce(config, port, progress, "plain gRPC, no Ray")
    )
    print("stopped", file=sys.stderr)
    return 0


def _announce(config: Any, port: int, progress: ProgressLine, how: str, logs: Path | None = None) -> None:
    """The address, who may come in, and a snippet to paste; on stdout, so that a script can wait for it."""
    from patchbay_server.store.keys import local_key_path

    progress.end()
    names = ", ".join(model.name for model in config.models)
    took = f"{progress.elapsed_s:.1f} s"
    lines = [f"Patchbay {__version__} serves {names} on port {port} ({how}; ready in {took}; Ctrl-C stops it)"]
    if config.insecure:
        lines.append("  WARNING: --insecure: whoever reaches this port may use it; no key is asked for")
    elif config.keys.write_local:
        lines.append(f"  clients on this machine find their key by themselves ({local_key_path(port)});")
        lines.append("  for others: patchbay keys create NAME")
    else:
        lines.append("  a key is required: patchbay keys create NAME")
    if logs is not None:
        lines.append(f"  logs while it runs: {logs / 'session_latest' / 'logs'}")
    model = config.models[0]
    prompt = "The capital of France is" if model.source == "demo" else "Hello"
    print("\n".join(lines) + "\n" + _SNIPPET.format(port=port, model=model.name, prompt=prompt), flush=True)
