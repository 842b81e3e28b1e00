"""A model under plain grpc.aio: ``python -m patchbay_server.demo.plain PORT SOURCE``."""

from __future__ import annotations

import sys

from patchbay_server.config import Config, ModelConfig
from patchbay_server.main import serve_plain


def main() -> None:
    """Serve on loopback until a signal comes."""
    port, source = int(sys.argv[1]), sys.argv[2]
    config = Config(host="127.0.0.1", port=port, models=(ModelConfig(source=source),))
    serve_plain(config, progress=print, ready=lambda port: print(f"ready on port {port}"))


if __name__ == "__main__":
    main()
