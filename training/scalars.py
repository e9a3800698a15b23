"""The numbers of log.txt for TensorBoard, which is an optional package."""

from functools import cache
from pathlib import Path

from runtime.commandline import InputError, brief


@cache
def writer_of(folder: Path):
    """Return what writes into the folder: a program has one file there, not one an epoch."""
    from torch.utils.tensorboard import SummaryWriter  # here, since the package may be missing

    return SummaryWriter(str(folder))


def write_scalars(folder: Path, history: list[dict]) -> None:
    """Write the numbers of the last epoch, at the number of completed epochs.

    After the first epoch also those of the untrained network, at 0.
    A continued run adds a file, and TensorBoard joins the files of a folder.
    Raises InputError if the folder cannot be written.
    """
    records = history[-1:]
    if len(history) == 2:
        records = history
    try:
        writer = writer_of(folder)
        for record in records:
            completed = record["epoch"] + 1
            for name, value in record.items():
                if name != "epoch" and not isinstance(value, list):  # curves are lists
                    writer.add_scalar(name, value, completed)
        writer.flush()
    except OSError as error:
        raise InputError(
            f"cannot write TensorBoard's file in {str(folder)!r} ({brief(error)}): leave "
            "--tensorboard out, or free some space; what was saved before is untouched"
        ) from None
