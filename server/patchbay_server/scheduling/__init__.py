"""Who runs next: admission, a bounded queue that is fair between accounts, and which forwards share the next one.

No network and no Ray here, and no clock that a test could not replace.
"""

from __future__ import annotations

from patchbay_server.scheduling.admission import AdmissionLimits, Scheduler, Ticket
from patchbay_server.scheduling.batcher import Batcher, Budget, Waiting
from patchbay_server.scheduling.fair_queue import FairQueue, RoundRobinQueue
from patchbay_server.scheduling.virtual_tokens import VirtualTokenQueue, VirtualTokens

__all__ = [
    "AdmissionLimits",
    "Batcher",
    "Budget",
    "FairQueue",
    "RoundRobinQueue",
    "Scheduler",
    "Ticket",
    "VirtualTokenQueue",
    "VirtualTokens",
    "Waiting",
]
