"""What every script shares: bad input becomes one clear line and exit status 2, never a traceback; and whole files."""
import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


class InputError(ValueError):
    """Something the person can mend; the message is the line they see: it names the flag or file, and the mend."""


def brief(said: object) -> str:
    """The start of another library's message, or of what a file says, on one line, to stand in one of ours."""
    return " ".join(str(said).split())[:100]


class CommandLine(argparse.ArgumentParser):
    """An argument parser whose errors are one line; flags are never abbreviated, so that a typo is an error."""

    def __init__(self, description: str | None):
        module = getattr(sys.modules["__main__"], "__spec__", None)  # none where a file was started, not python -m
        name = f"python -m {module.name.removesuffix('.__main__')}" if module else None
        super().__init__(name, description=description, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message} (--help lists the flags)\n")


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Print an InputError as one line and exit with status 2; one from a loader's worker arrives wrapped in text.

    Ctrl-C is one line too, and status 130. A folder's name that the terminal cannot show is printed as far as it can.
    """
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        yield
    except InputError as error:
        print(f"error: {str(error).rsplit('InputError: ', 1)[-1].strip()}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)


def true_or_false(text: str) -> bool:
    """The release's spelling of a switch: --norm_last_layer true."""
    if text.lower() in ("true", "on", "1", "yes"):
        return True
    if text.lower() in ("false", "off", "0", "no"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


def write_whole(path: str | Path, write: Callable[[Path], object]) -> None:
    """Call write(temporary path) and rename: the file at `path` is the old one or the new one, never a part."""
    path = Path(path)
    part = path.with_name(f".{path.name}.part{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(part)
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        with suppress(OSError):  # there may be no such folder, or no right to write there
            part.unlink()
        raise InputError(f"cannot write {str(path)!r} ({brief(error)}): let its folder be written, or "
                         "free some space; what was saved before is untouched") from None
