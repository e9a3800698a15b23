"""The faults wait more than they compute: two of their files run at a time, unless -n says otherwise."""
import os

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    started_by_another = "PYTEST_XDIST_WORKER" in os.environ
    if config.option.markexpr == "faults" and config.option.numprocesses is None and not started_by_another:
        config.option.numprocesses, config.option.dist = 2, "loadfile"
