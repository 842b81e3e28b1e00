"""What can be seen inside a recurrence or convolution over positions."""

from __future__ import annotations

from patchbay_server.models.binding.block import Block
from patchbay_server.models.recording import Value

#: Every canonical name below ``ssm.``.
STATE_SITES = ("conv", "dt", "B", "C", "state", "y")


def bind_mixer(block: Block, raw: Value) -> None:
    """Derive the sites below ``ssm.`` of a layer whose mixer gives `raw`."""
    del raw
    block.absent("not derived", *(f"ssm.{n}" for n in STATE_SITES))
