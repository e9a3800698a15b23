"""Which prototypes does a teacher use? A histogram of the test images' favourites.

    python -m classroom.prototypes runs/labs/both runs/labs/no-centering --output prototypes.png

A favourite is the prototype to which the teacher gives an image's largest probability, Eq. 1 with
the center. Beside the runs stands the first one's network before its training.
"""

from argparse import Namespace
from dataclasses import fields
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from data import at_most
from features import EvaluationView
from runtime import hardware
from runtime.commandline import CommandLine, InputError, errors_in_one_line, write_whole
from runtime.hardware import World
from settings import Settings
from training.ablated import not_plain
from training.checkpoint import read_checkpoint
from training.inputs import read_images
from training.run_state import RunState, load_run, start_run
from training.weights import checkpoint_args

MOST_IMAGES = 1000


def settings_of(folder: Path) -> Settings:
    """Return the settings of the run in a folder."""
    path = folder / "checkpoint.pth"
    if not path.is_file():
        raise InputError(f"no checkpoint.pth in {str(folder)!r}: give the folder of a run")
    args = checkpoint_args(read_checkpoint(path), path)
    if not_plain(args):
        raise InputError(f"{str(folder)!r} is a run of ablations.train: give one of train.py")
    names = {one.name for one in fields(Settings)}
    return Settings(**{name: value for name, value in args.items() if name in names})


def views_of_test_images(settings: Settings, world: World) -> Tensor:
    """Return a run's test images, or its train images if it has no others: (n, 3, S, S)."""
    train_images, test_images = read_images(settings, world)
    images = at_most(test_images or train_images, MOST_IMAGES)
    view = EvaluationView(settings.eval_size, settings.eval_crop, settings.mean, settings.std)
    return torch.stack([view(images[index][0]) for index in range(len(images))])


@torch.no_grad()
def probabilities(run: RunState, views: Tensor, settings: Settings) -> Tensor:
    """Return the teacher's probabilities: (n, 3, S, S) -> (n, K)."""
    return run.dino_loss.teacher_probs(run.teacher([views]), settings.teacher_temp)


def favourites(probs: Tensor) -> Tensor:
    """Return how many images have each prototype as their favourite: (n, K) -> (K,)."""
    return probs.argmax(dim=1).bincount(minlength=probs.shape[1])


def describe(name: str, probs: Tensor) -> str:
    """Return a line: how many prototypes are used, and how sure the teacher is of an image."""
    counts = favourites(probs)
    used = (counts > 0).sum().item()
    sure = probs.amax(dim=1).mean().item()
    return (
        f"{name}: {used} of {len(counts)} prototypes are a favourite, the most frequent that of "
        f"{counts.max()} of {counts.sum()} images; a favourite has a probability of {sure:.3f} "
        f"on average (1/K = {1 / len(counts):.3f})"
    )


def draw(path: Path, named: list[tuple[str, Tensor]]) -> None:
    """Draw a histogram for each name and its probabilities (n, K)."""
    figure = Figure(figsize=(3.2 * len(named), 2.6), layout="constrained")
    grid = figure.subplots(1, len(named), squeeze=False, sharex=True, sharey=True)[0]
    for axes, (name, probs) in zip(grid, named, strict=True):
        counts = favourites(probs).sort(descending=True).values
        counts = counts[counts > 0]
        axes.bar(range(len(counts)), counts.tolist(), width=1)
        axes.set_title(name, fontsize=9)
        axes.set_yscale("log")  # one of a thousand images and all of them in one figure
        axes.set_xlabel("prototypes, the most frequent first")
    grid[0].set_ylabel("test images")
    write_whole(path, lambda part: figure.savefig(part, dpi=100))


def compare(flags: Namespace) -> None:
    """Print a line for each run, and draw them beside each other."""
    named = []  # a name and probabilities; two runs may have one name
    with hardware.start("cpu", "fp32") as world:
        for folder in flags.runs:
            settings = settings_of(folder)
            run = start_run(settings, world)  # the weights of the first step, from the same seed
            views = views_of_test_images(settings, world)
            if not named:
                named.append(("before the training", probabilities(run, views, settings)))
            load_run(folder / "checkpoint.pth", run, settings)
            named.append((folder.name, probabilities(run, views, settings)))
    for name, probs in named:
        print(describe(name, probs))
    draw(flags.output, named)


def main(argv: list[str] | None = None) -> None:
    parser = CommandLine(__doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="folders with a checkpoint.pth")
    parser.add_argument("--output", type=Path, default=Path("prototypes.png"))
    with errors_in_one_line():
        compare(parser.parse_args(argv))


if __name__ == "__main__":
    main()
