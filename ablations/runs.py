"""A row of the ablations as a run of ablations/train.py: settings, folder, command, training.

A run's folder is named after its settings, so that equal rows are trained once.
Whoever works there holds a lock, so that several processes of python -m ablations can share an
--output_dir (not on Windows, which has no such locks).
"""

import argparse
import json
import os
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from ablations.rows import Row, Study, as_flags
from ablations.train import AblationSettings, parse
from runtime.commandline import InputError
from settings import marked

REPO = Path(__file__).parent.parent


class Run(NamedTuple):
    """One row with one seed; changed: the settings that are not the defaults."""

    row: Row
    seed: int
    settings: AblationSettings
    changed: dict
    folder: Path
    command: list[str]


def launch(script: list[str], flags: argparse.Namespace) -> list[str]:
    """Return the start of a command, under torchrun for several processes.

    script: a file, or -m and a module.
    """
    if flags.nproc_per_node == 1:
        return [sys.executable, *script]
    processes = f"--nproc_per_node={flags.nproc_per_node}"
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", processes, *script]


def make_run(study: Study, row: Row, seed: int, flags: argparse.Namespace) -> Run:
    """Return a run with checked settings; raises InputError for a wrong one."""
    base = {"preset": flags.preset, "saveckp_freq": 0} | study.shared(flags.preset)
    for name in ("data_path", "epochs"):
        if getattr(flags, name):
            base[name] = getattr(flags, name)
    own = row.changes(flags.preset) | {"seed": seed}
    line = [*as_flags(base), *flags.more, *as_flags(own)]  # the last of two equal flags counts

    settings = parse(line)
    defaults = asdict(AblationSettings())
    ignored = [*marked(AblationSettings, "quiet"), "seed"]
    changed = {}
    for name, value in asdict(settings).items():
        if value != defaults[name] and name not in ignored:
            changed[name] = value
    key = zlib.crc32(json.dumps([changed, flags.nproc_per_node], sort_keys=True).encode())
    folder = Path(flags.output_dir, f"{key:08x}", f"seed{seed}")

    command = launch(["-m", "ablations.train"], flags)
    command += [*line, "--output_dir", str(folder)]
    return Run(row, seed, settings, changed, folder, command)


def read_objects(path: Path, parse: Callable[[str], object], fix: str) -> list[dict]:
    """Return the JSON objects that parse makes of a file's text; [] if there is no file.

    Raises InputError with the fix if it is damaged.
    """
    if not path.exists():
        return []
    try:
        found = parse(path.read_text())
        if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
            raise ValueError
        return found
    except ValueError:
        raise InputError(f"{str(path)!r} is damaged: {fix}") from None


def read_lines(path: Path) -> list[dict]:
    """Return the JSON objects of log.txt or another such file, one a line; [] if there are none."""

    def parse_lines(text: str) -> list[dict]:
        return [json.loads(line) for line in text.splitlines()]

    return read_objects(path, parse_lines, "remove it, and the same command makes it again")


def finished(run: Run) -> bool:
    """Return whether all epochs are done, and the last one's k-NN if the images have labels."""
    log = read_lines(run.folder / "log.txt")
    if not log or log[-1]["epoch"] + 1 < run.settings.epochs:
        return False
    return "knn_untrained" not in log[0] or "knn_teacher" in log[-1]


def stop_if_asked(signals: list[int]) -> None:
    """Exit if a signal has come; called at moments when all that is done is kept."""
    if signals:
        print("stopped; the same command continues there")
        sys.exit(128 + signals[0])


def execute(command: list[str], signals: list[int]) -> int:
    """Run a command to its end and return its exit status.

    A signal is passed on as SIGTERM; then this program exits too.
    """
    # python -m would look into the current folder first: our modules are to come from here
    path = str(REPO)
    if os.environ.get("PYTHONPATH"):
        path += os.pathsep + os.environ["PYTHONPATH"]
    environment = os.environ | {"PYTHONSAFEPATH": "1", "PYTHONPATH": path}

    process = subprocess.Popen(command, env=environment)
    while process.poll() is None and not signals:
        time.sleep(0.1)
    # on Windows this would kill it; there it gets Ctrl-C by itself
    if process.poll() is None and sys.platform != "win32":
        process.terminate()
    process.wait()
    stop_if_asked(signals)
    return process.returncode


@contextmanager
def alone(folder: Path, signals: list[int]) -> Iterator[None]:
    """Hold the folder's lock inside; wait for it while another process works there.

    Exits if a signal has come.
    """
    stop_if_asked(signals)
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".row", "w") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                time.sleep(0.5)
                stop_if_asked(signals)
        yield


def train_all(runs: list[Run], signals: list[int]) -> tuple[list[Run], list[str]]:
    """Train what is not finished; return the finished runs, and a line for each that failed."""
    failed: dict[Path, str] = {}
    for number, run in enumerate(runs, start=1):
        if finished(run) or run.folder in failed:
            continue
        name = f"{run.row.name}, seed {run.seed}"
        print(f"\n{number}/{len(runs)} {name}: {run.folder}", flush=True)
        with alone(run.folder, signals):
            status = 0
            if not finished(run):  # another process may have trained it meanwhile
                status = execute(run.command, signals)
        if status or not finished(run):
            reason = f"failed with exit status {status} and is left out"
            failed[run.folder] = f"{name} {reason}: its own words are above"
            print(failed[run.folder], flush=True)
    done = [run for run in runs if finished(run) and run.folder not in failed]
    return done, list(failed.values())
