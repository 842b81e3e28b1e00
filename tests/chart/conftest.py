"""The chart's tests need a real helm; without it they skip, saying how to get it."""

from __future__ import annotations

import pytest

from tests.chart import charts


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if charts.HELM.exists():
        return
    absent = pytest.mark.skip(reason="no helm in .tools/bin: run tests/chart/install-tools.sh (needs npm)")
    for item in items:
        if item.get_closest_marker("chart"):
            item.add_marker(absent)


@pytest.fixture(scope="session", params=["defaults", *charts.EXAMPLES])
def release(request: pytest.FixtureRequest) -> charts.Release:
    """The chart, rendered with its own values and with each example in helm/patchbay/ci."""
    return charts.render() if request.param == "defaults" else charts.render(request.param)
