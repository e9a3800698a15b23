"""Plain `pytest` and the faults run two files at a time, each on a core, unless -n says otherwise;
no fault may hang.
"""

import os
import signal
from collections.abc import Iterator

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    whole_suite = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    started_by_another = "PYTEST_XDIST_WORKER" in os.environ
    if whole_suite and config.option.numprocesses is None and not started_by_another:
        config.option.numprocesses, config.option.dist = 2, "loadfile"
    # set, a busy machine does not change it, and with it the rounding of sums
    threads = os.cpu_count()
    if config.option.numprocesses:
        threads = 1  # two of them would wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))


@pytest.fixture(autouse=True)
def a_hang_ends(request: pytest.FixtureRequest) -> Iterator[None]:
    """A fault's test that takes ten minutes ends the process that runs it, wherever it hangs."""
    if request.node.get_closest_marker("faults") and hasattr(signal, "alarm"):
        signal.alarm(600)
        yield
        signal.alarm(0)
    else:
        yield


@pytest.fixture
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """No figure of the curves: a tiny run spends most of its time on that. For other tests."""
    monkeypatch.setattr("training.report.draw_epochs", lambda *_: None)


@pytest.fixture
def no_report(no_curves: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """No figures and no last paragraph either."""
    monkeypatch.setattr("training.report.finish", lambda *_: "")
