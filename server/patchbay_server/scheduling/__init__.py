"""Who runs next: admission, a bounded queue that is fair between accounts, and the slots that the engine offers.

No network and no Ray here, and no clock that a test could not replace.
"""

from __future__ import annotations

from patchbay_server.scheduling.admission import AdmissionLimits, Scheduler, Ticket
from patchbay_server.scheduling.fair_queue import FairQueue, RoundRobinQueue

__all__ = ["AdmissionLimits", "FairQueue", "RoundRobinQueue", "Scheduler", "Ticket"]
