"""Turns a graph into as few forwards of a model as it needs, and runs them."""

from patchbay_server.engine.engine import Engine
from patchbay_server.engine.plan import Plan
from patchbay_server.engine.trunks import TrunkCache

__all__ = ["Engine", "Plan", "TrunkCache"]
