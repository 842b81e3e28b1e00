"""The one place where the version is written; the build, the CLI and ``patchbay.__version__`` read it here."""

__version__ = "0.1.0"
