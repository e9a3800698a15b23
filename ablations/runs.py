"""A row of the ablations as a run of ablations/train.py: its settings, folder, command and training.

A run's folder is named after its settings, so that equal rows are trained once; whoever works there holds a lock, so
that several processes of python -m ablations can share an --output_dir (not on Windows, which has no such locks).
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
    """One row with one seed: its settings, those that are not train.py's defaults, its folder, and its command."""

    row: Row
    seed: int
    settings: AblationSettings
    changed: dict
    folder: Path
    command: list[str]


def launch(script: list[str], flags: argparse.Namespace) -> list[str]:
    """The start of a command: plain Python, or as many processes as asked for; script: a file, or -m and a module."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={flags.nproc_per_node}"]
    return [sys.executable, *torchrun * (flags.nproc_per_node > 1), *script]


def make_run(study: Study, row: Row, seed: int, flags: argparse.Namespace) -> Run:
    """A run with checked settings; its folder is named after what they come to, so that equal runs have the same."""
    given = {name: getattr(flags, name) for name in ("data_path", "epochs") if getattr(flags, name)}
    base = {"preset": flags.preset, "saveckp_freq": 0} | study.shared(flags.preset) | given
    line = [*as_flags(base), *flags.more, *as_flags(row.changes(flags.preset) | {"seed": seed})]
    settings, defaults = parse(line), asdict(AblationSettings())
    equal = [*marked(AblationSettings, "quiet"), "seed"]  # with another of these it is the same run
    changed = {name: value for name, value in asdict(settings).items()
               if value != defaults[name] and name not in equal}
    key = zlib.crc32(json.dumps([changed, flags.nproc_per_node], sort_keys=True).encode())
    folder = Path(flags.output_dir, f"{key:08x}", f"seed{seed}")
    command = [*launch(["-m", "ablations.train"], flags), *line, "--output_dir", str(folder)]
    return Run(row, seed, settings, changed, folder, command)


def read_objects(path: Path, parse: Callable[[str], object], mend: str) -> list[dict]:
    """The JSON objects that parse makes of a file's text, none if it is not there; mend is told if it is damaged."""
    try:
        found = parse(path.read_text()) if path.exists() else []
        if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
            raise ValueError
        return found
    except ValueError:
        raise InputError(f"{str(path)!r} is damaged: {mend}") from None


def read_lines(path: Path) -> list[dict]:
    """The JSON objects of log.txt or another such file, a line each; none if it is not there, or empty."""
    return read_objects(path, lambda text: [json.loads(line) for line in text.splitlines()],
                        "remove it, and the same command makes it again")


def finished(run: Run) -> bool:
    """Whether all epochs are done, and the last one's k-NN if the images have labels."""
    log = read_lines(run.folder / "log.txt")
    return bool(log) and log[-1]["epoch"] + 1 >= run.settings.epochs and (
        "knn_untrained" not in log[0] or "knn_teacher" in log[-1])


def stop_if_asked(signals: list[int]) -> None:
    """Exit if a signal has come; for moments at which all that is done is kept."""
    if signals:
        print("stopped; the same command continues there")
        sys.exit(128 + signals[0])


def execute(command: list[str], signals: list[int]) -> int:
    """A command to its end -> its exit status. A signal is passed on as SIGTERM; then this exits."""
    # modules are this repository's, wherever it is started: python -m would look into the current folder first
    path = os.pathsep.join(filter(None, [str(REPO), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(command, env=os.environ | {"PYTHONSAFEPATH": "1", "PYTHONPATH": path})
    while process.poll() is None and not signals:
        time.sleep(0.1)
    if process.poll() is None and sys.platform != "win32":  # where it would not be asked, but ended; it has Ctrl-C too
        process.terminate()
    process.wait()
    stop_if_asked(signals)
    return process.returncode


@contextmanager
def alone(folder: Path, signals: list[int]) -> Iterator[None]:
    """Hold the folder's lock inside; wait for it while another process works there. Exits if a signal has come."""
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
    """Train what is not finished -> the runs that are, and a line for each that failed."""
    failed: dict[Path, str] = {}
    for i, run in enumerate(runs, start=1):
        if finished(run) or run.folder in failed:
            continue
        print(f"\n{i}/{len(runs)} {run.row.name}, seed {run.seed}: {run.folder}", flush=True)
        with alone(run.folder, signals):
            status = 0 if finished(run) else execute(run.command, signals)
        if status or not finished(run):
            failed[run.folder] = (f"{run.row.name}, seed {run.seed} failed with exit status {status} and is left out: "
                                  "its own words are above")
            print(failed[run.folder], flush=True)
    return [run for run in runs if finished(run) and run.folder not in failed], list(failed.values())
