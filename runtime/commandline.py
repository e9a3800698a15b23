"""What all scripts share: errors in one line with exit status 2, and files written whole."""

import argparse
import io
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from runtime.suggestions import explained

# the words of PyTorch's allocators, of numpy's, and of tensors too large for any memory
FULL = r"allocate|out of memory|Storage size calculation overflowed|integer multiplication overflow"


class InputError(ValueError):
    """Something a person can fix. The message is one line: the flag or file, and the fix."""


def brief(said: object) -> str:
    """Return the start of a foreign text, on one line, to stand in a message of ours."""
    return " ".join(str(said).split())[:100]


class CommandLine(argparse.ArgumentParser):
    """An argument parser whose errors are one line, and which takes no abbreviated flags."""

    def __init__(self, description: str | None):
        # python -m evals.linear: argparse would call it linear.py; a file has no __spec__
        spec = getattr(sys.modules["__main__"], "__spec__", None)
        name = None
        if spec:
            name = f"python -m {spec.name.removesuffix('.__main__')}"
        super().__init__(
            name,
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.register("type", int, whole_number)
        # torch.distributed.launch passes it; LOCAL_RANK in the environment says the same
        hidden = argparse.SUPPRESS
        self.add_argument("--local_rank", "--local-rank", default=hidden, help=hidden)

    def parse_known_args(self, args=None, namespace=None):
        """Parse as argparse does; ~ is the home folder, and an empty value is an error."""
        given = []
        flag = ""
        for word in sys.argv[1:] if args is None else args:
            before, value = "", word
            if word.startswith("--"):
                flag, equals, after = word.partition("=")
                if equals:
                    before, value = f"{flag}=", after
            if not value:  # --data_path "$PHOTOS" would train on the embedded images
                self.error(f"{flag} has an empty value: is a variable of the shell not set?")
            # the shell leaves --data_path=~/photos as it is
            given.append(before + os.path.expanduser(value))
        return super().parse_known_args(given, namespace)

    def error(self, message: str) -> None:
        message = explained(message, self._option_string_actions)
        self.exit(2, f"{self.prog}: error: {message} (--help lists the flags)\n")


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Print an InputError, or that memory is full, as one line and exit with status 2.

    Ctrl-C: one line and status 130.
    """
    if hasattr(sys.stdout, "reconfigure"):
        # for names of folders that the terminal cannot show
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        yield
    except InputError as error:
        # from a loader's worker it arrives inside of a longer text
        text = str(error).rsplit("InputError: ", 1)[-1].strip()
        print(f"error: {text}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        print("error: what read the output has ended, as | head does", file=sys.stderr)
        # else Python tries once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(2)
    except Exception as error:
        exit_if_full(error)
        raise
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)


def exit_if_full(error: Exception) -> None:
    """Print an error about full memory as one line and exit with status 2; return after others."""
    said = re.search(rf"[^.:]*({FULL}).*", str(error))
    if not said and not isinstance(error, MemoryError):
        return
    words = brief(said[0]) if said else "no more is free"
    print(
        f"error: the memory does not suffice ({words}): lower the images of a batch, the pixels, "
        "or the network's widths",
        file=sys.stderr,
    )
    sys.exit(2)


def whole_number(text: str) -> int:
    """Return an integer of 64 bits, as PyTorch has them."""
    number = int(text)
    if abs(number) >= 2**63:
        raise argparse.ArgumentTypeError(f"{brief(text)} is too large")
    return number


class Lines(io.TextIOBase):
    """A file for tqdm that prints each state of a bar as a line on stderr."""

    def write(self, text: str) -> None:
        if text.strip():
            print(text.strip(), file=sys.stderr, flush=True)


def bar_style(seconds: float = 60) -> dict:
    """Return tqdm's options: a bar on a terminal; in a file a line, at most one in so long."""
    if sys.stderr.isatty():
        return {}
    return {
        "file": Lines(),
        "bar_format": "{desc} {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]",
        "miniters": 1,  # else a thread of tqdm's prints slow bars every ten seconds
        "mininterval": seconds,
        "delay": seconds,
    }


def true_or_false(text: str) -> bool:
    """Return what a switch is set to, spelled as in the release: --norm_last_layer true."""
    if text.lower() in ("true", "on", "1", "yes"):
        return True
    if text.lower() in ("false", "off", "0", "no"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


def write_whole(path: str | Path, write: Callable[[Path], object]) -> None:
    """Call write(temporary path), then rename: the file is the old one or the new, never a part.

    Raises InputError if it cannot be written.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.part{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(part)
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        with suppress(OSError):  # there may be no such folder, or no right to write there
            part.unlink()
        raise InputError(
            f"cannot write {str(path)!r} ({brief(error)}): let its folder be written, or free "
            "some space; what was saved before is untouched"
        ) from None
