"""What ablations/ and classroom/race.py put in place of a training's parts."""

from collections.abc import Callable
from typing import NamedTuple

from training import inputs, run_state


class Hooks(NamedTuple):
    """The functions that train.train calls; those here are DINO's.

    read_images, make_loader: as training/inputs.py has them.
    start_run: (settings, world) -> RunState with fresh networks, loss and optimizer.
    make_follow: (run, steps of an epoch, steps done in it) -> what update_teacher is; None: itself.
    before_save: (run, world) -> None, called before each checkpoint.
    """

    read_images: Callable = inputs.read_images
    make_loader: Callable = inputs.make_loader
    start_run: Callable = run_state.start_run
    make_follow: Callable | None = None
    before_save: Callable | None = None


DINO = Hooks()
