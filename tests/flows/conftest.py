"""Prefect for the tests: a real ephemeral server with a database of its own, started once per session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from prefect.settings import (
    PREFECT_SERVER_ANALYTICS_ENABLED,
    PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS,
    temporary_settings,
)
from prefect.testing.utilities import prefect_test_harness

EMPTY_CHART = '<svg xmlns="http://www.w3.org/2000/svg" width="10" height="10" viewBox="0 0 10 10"></svg>'


@pytest.fixture(autouse=True)
def plain_charts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves charts empty but where reports are tested: drawing them takes longer than most curations."""
    if "report" not in request.node.module.__name__:
        monkeypatch.setattr("corpus.charts._svg", lambda spec, width: EMPTY_CHART)


@pytest.fixture(scope="session")
def prefect() -> Iterator[None]:
    settings = {PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS: 300, PREFECT_SERVER_ANALYTICS_ENABLED: False}
    with temporary_settings(settings), prefect_test_harness(server_startup_timeout=300):
        yield
