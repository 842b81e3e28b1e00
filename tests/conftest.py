"""What every test shares: hypothesis profiles, signals. Fixtures live in the conftest of the room that uses them."""

import os
import signal

from hypothesis import HealthCheck, settings

# CI prints how to reproduce a failure and is never failed by a slow neighbour's clock.
settings.register_profile(
    "ci", deadline=None, derandomize=False, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("dev", deadline=None)
settings.load_profile("ci" if os.environ.get("CI") else "dev")

# A runner that starts jobs in the background ignores Ctrl-C on their behalf, and children inherit that: the tests that
# press Ctrl-C on a service would then wait for ever.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
