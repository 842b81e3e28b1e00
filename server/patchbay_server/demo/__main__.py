"""Flags of ``python -m patchbay_server.demo``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from patchbay_server.demo.launcher import CLIENT, Demo, run_demo


def main(argv: list[str] | None = None) -> int:
    """Run the demo; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m patchbay_server.demo",
        description="Start the service, run examples/demo.py against it from a separate process, stop everything.",
    )
    parser.add_argument(
        "--model",
        default="demo",
        help="`demo` (the embedded one), a Hugging Face id or a folder (default: %(default)s)",
    )
    parser.add_argument("--plain", action="store_true", help="plain grpc.aio instead of Ray Serve and HAProxy")
    parser.add_argument(
        "--report", type=Path, default=Path("demo-report.html"), help="where the report goes (default: %(default)s)"
    )
    parser.add_argument("--client", type=Path, default=CLIENT, help="the client half (default: examples/demo.py)")
    parser.add_argument(
        "--timeout",
        type=float,
        default=300.0,
        metavar="S",
        help="seconds to wait for the service (default: %(default)g)",
    )
    parser.add_argument("--log", type=Path, help="keep the service's log in this file")
    args = parser.parse_args(argv)
    if not args.client.is_file():
        parser.error(
            f"the client half {args.client} is not there; it comes with the source as examples/demo.py: --client PATH"
        )
    return run_demo(
        Demo(
            source=args.model,
            plain=args.plain,
            report=args.report.resolve(),
            client=args.client.resolve(),
            timeout_s=args.timeout,
            log=None if args.log is None else args.log.resolve(),
        )
    )


if __name__ == "__main__":
    sys.exit(main())
