"""The folder that gets a tool's files, which removes and overwrites nothing else in it."""

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from runtime.commandline import InputError


class OutputFolder:
    """The folder that gets a tool's files, and the list of them, a hidden file in it.

    Only what an earlier call put on the list is removed. No other file is overwritten.
    """

    def __init__(self, folder: Path, list_name: str, inputs: Iterable[Path]):
        """Read an earlier call's list. Raises InputError where an input is on it."""
        self.folder = folder
        self.list = folder / list_name
        self.earlier = []
        self.names = set()  # this call's
        if self.list.exists():
            # a file's name can have a line break, but no NUL
            self.earlier = os.fsdecode(self.list.read_bytes()).split("\0")[:-1]

        read = {file.resolve() for file in inputs}
        for name in self.earlier:
            path = folder / name
            if path.resolve() in read:
                raise would_be_overwritten(path)

    def remove_earlier(self) -> None:
        """Remove the earlier call's files, which would pass for this call's, and their folders."""
        for name in self.earlier:
            path = self.folder / name
            path.unlink(missing_ok=True)
            if path.parent != self.folder:
                with suppress(OSError):  # other files are in it
                    path.parent.rmdir()
        self.list.unlink(missing_ok=True)

    def file(self, *parts: str) -> Path:
        """Return where a file is to be written: put it on the list, and make its folder.

        Raises InputError where a file is that this call did not write.
        """
        path = self.folder.joinpath(*parts)
        name = str(path.relative_to(self.folder))
        if name in self.names:
            return path
        if path.exists():
            raise would_be_overwritten(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with self.list.open("ab") as names:
            names.write(os.fsencode(name) + b"\0")
        self.names.add(name)
        return path


def would_be_overwritten(path: Path) -> InputError:
    return InputError(
        f"{str(path)!r} would be overwritten: move it, or choose another --output_dir"
    )
