"""Files that are all there is of somebody's work: the whole of one is written, or nothing."""
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from commandline import InputError, brief


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
