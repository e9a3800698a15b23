"""The faults wait more than they compute: two of their files run at a time, unless -n says
otherwise; none may hang.
"""

import os
import signal
from collections.abc import Iterator

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    started_by_another = "PYTEST_XDIST_WORKER" in os.environ
    if (
        config.option.markexpr == "faults"
        and config.option.numprocesses is None
        and not started_by_another
    ):
        config.option.numprocesses, config.option.dist = 2, "loadfile"


@pytest.fixture(autouse=True)
def a_hang_ends(request: pytest.FixtureRequest) -> Iterator[None]:
    """A fault's test that takes ten minutes ends the process that runs it, wherever it hangs."""
    if request.node.get_closest_marker("faults") and hasattr(signal, "alarm"):
        signal.alarm(600)
        yield
        signal.alarm(0)
    else:
        yield
