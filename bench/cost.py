"""What a training's steps cost: their time and memory, and the speed of the features.

    python -m bench.cost --preset demo --patch_size 4 --output_dir runs/small-patches

It takes the settings of train.py, makes a few steps on noise, and writes costs.json into the output
folder. On a CPU the memory is that of the whole process, so each measurement needs one of its own.
The exit status is errno.ENOMEM if the memory does not suffice, and 2 after other errors.
"""

import errno
import json
import sys
from pathlib import Path

import torch

from bench import measure
from bench.step import cost_of_steps, make_ours
from runtime import hardware
from runtime.commandline import errors_in_one_line, write_whole
from settings import Settings, parse_settings

TURNS, SECONDS = 7, 15.0  # steps that are timed, at most; after two, none begins later


def costs(settings: Settings) -> dict[str, float | None]:
    """Return cost_of_steps' numbers, and the train images/s; mib is None where it is not known."""
    with hardware.start(settings.device, settings.precision) as world:
        found = cost_of_steps(
            make_ours, settings, world, torch.get_num_threads(), TURNS, SECONDS
        )
    found["train_per_s"] = 1000 * settings.batch_size_per_gpu / found["ms"]
    return found


def main(argv: list[str] | None = None) -> None:
    with errors_in_one_line():
        settings = parse_settings(argv)
        try:
            with measure.full_memory_in_one_line("--batch_size_per_gpu"):
                line = json.dumps(costs(settings))
        except measure.FullMemory as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(errno.ENOMEM)
        path = Path(settings.output_dir, "costs.json")
        write_whole(path, lambda part: part.write_text(line + "\n"))
        print(line)


if __name__ == "__main__":
    main()
