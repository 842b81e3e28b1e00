"""What every test shares: hypothesis profiles. Fixtures live in the conftest of the room that uses them."""

import os

from hypothesis import HealthCheck, settings

# CI prints how to reproduce a failure and is never failed by a slow neighbour's clock.
settings.register_profile(
    "ci", deadline=None, derandomize=False, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("dev", deadline=None)
settings.load_profile("ci" if os.environ.get("CI") else "dev")
