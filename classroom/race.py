"""The race: how good a network for a budget? The rules are in classroom/README.md.

    python -m classroom race --track embedded --name hotter -- --lr 0.01     # flags of train.py
    python -m classroom race --track embedded --name ours --entry ours.py    # a file with own parts
    python -m classroom race --track photos --name ours --data_path photos/  # class folders

Behind -- stand flags of train.py. The judge draws or reads the images, hands them to the training
without labels, trains three seeds, and prints the k-NN accuracy of the teacher's features.
"""

import argparse
import json
import math
import os
import runpy
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from tempfile import mkdtemp
from traceback import extract_tb
from typing import NamedTuple

from torch import Tensor, nn

import train
from data import Images, draw_images, knn_split
from features import EvaluationView, Pixels, extract, knn_accuracies
from multicrop import MultiCrop
from runtime import hardware
from runtime.commandline import (
    CommandLine,
    InputError,
    brief,
    errors_in_one_line,
    exit_if_full,
)
from runtime.flops import flops
from runtime.hardware import World
from settings import Settings, parse_settings
from teacher import update_teacher
from training import inputs, run_state
from training.hooks import Hooks
from training.run_state import RunState, make_backbone, make_head, make_loss, prepare_step

RESULTS = Path(__file__).parent / "race.jsonl"
RUNS = Path("runs/race")
SEEDS = (101, 102, 103)  # of creatures, weights, order and crops; train.py's default is 0
BUDGETS = {"embedded": 12.0, "photos": 10.0}
UNITS = {"embedded": "TFLOP", "photos": "minutes"}
# What a contestant's flags change. Ten minutes pay for five to eight epochs of 10,000 photos, too
# few for the warm-ups of an hour.
RECIPES = {
    "embedded": "--preset lab --warmup_epochs 2",
    "photos": "--preset photos --warmup_epochs 1 --warmup_teacher_temp_epochs 2",
}
TOLERANCE = 1.1  # ten steps measure a speed roughly: a training may take a tenth more minutes
COMPARED = {"track", "data", "budget", "name", "mean", "spread"}  # what a line needs
WARMUP_STEPS, TIMED_STEPS = 3, 10

# flags of train.py that a contestant may not give
JUDGES = {
    "epochs": "the budget pays for so many steps, and the epochs follow",
    "preset": "all entries of a track change one recipe",
    "seed": "the judge has seeds of its own",
    "data_path": "the images are the judge's (--data_path of photos stands before --)",
    "dataset": "the images are the judge's",
    "init_from": "a network starts from random weights",
    "output_dir": "the judge keeps its runs in runs/race",
    "compile": "the budget is counted without it",
    "cuda_graph": "the budget is counted without it",
}


# -- a contestant's file


class Entry(NamedTuple):
    """The parts that a contestant's file may replace, by the names of its functions."""

    make_backbone: Callable = make_backbone  # settings -> a network with .embed_dim
    make_head: Callable = make_head  # settings, embed_dim -> features (B, D) to logits (B, K)
    make_loss: Callable = make_loss  # settings -> as docs/extending.md describes it
    make_multicrop: Callable = inputs.make_multicrop  # settings -> a MultiCrop


def read_entry(path: str) -> Entry:
    """Return the parts that the file defines, and DINO's for the others.

    Raises InputError for a file that does not run, for functions of other names, and for a part
    that is no function.
    """
    if not path:
        return Entry()
    if not Path(path).is_file():
        raise InputError(f"--entry {path!r} is not there: check the path")
    try:
        found = runpy.run_path(path)
    except Exception as error:  # a contestant's file may raise anything
        raise InputError(f"--entry {path} does not run ({brief(repr(error))}): fix it") from None

    allowed = ", ".join(Entry._fields)
    parts = {}
    for name, value in found.items():
        if name in Entry._fields:
            if not callable(value):
                said = f"{name} is {brief(repr(value))}: write a function def {name}(...)"
                raise InputError(f"--entry {path}: {said}")
            parts[name] = value  # however it was made: def, class or partial
            continue
        # what the file imports is not its own
        own = callable(value) and getattr(value, "__module__", "") == found["__name__"]
        if not own or isinstance(value, type) or name.startswith("_"):
            continue
        raise InputError(
            f"--entry {path}: {name} is no part of a training: the functions are {allowed}; "
            "begin the name of a helper with _"
        )
    if not parts:
        raise InputError(f"--entry {path} replaces nothing: define one of {allowed}")
    return Entry(**parts)


def read_settings(track: str, flags: list[str]) -> Settings:
    """Return a contestant's settings: the track's recipe, changed by flags of train.py."""
    for word in flags:
        name = word.partition("=")[0].removeprefix("--")
        if word.startswith("--") and name in JUDGES:
            raise InputError(f"--{name} is not the contestant's ({JUDGES[name]}): leave it out")
    # So many that no sensible warm-up is too long. Whether it is for those that are paid for: fit
    settings = parse_settings([*RECIPES[track].split(), "--epochs", "1000000000", *flags])
    return replace(settings, compile="false", saveckp_freq=0)


def place(error: Exception) -> str:
    """Return where in the contestant's file a call failed: in line 7, or as it was called."""
    frames = extract_tb(error.__traceback__)  # the first one is the call itself
    if len(frames) == 1:
        return "when it is called"
    return f"in line {frames[1].lineno}"


# -- one training


class Contest:
    """One seed's training of an entry, on images that the judge gives it.

    runs: what start_run made, the trained one first.
    """

    def __init__(self, entry: Entry, images: Images):
        self.entry = entry
        # neither labels nor masks: a training that reads them finds none
        self.images = Images(images.source, levels=images.levels)
        self.loaded = None  # loader and batches, of measuring and training: files are decoded once
        self.runs: list[RunState] = []

    def part(self, name: str, kind: type, settings: Settings, *more):
        """Return what a function of the entry makes.

        Raises InputError if it fails, or returns something of another kind.
        """
        make = getattr(self.entry, name)
        if make is Entry._field_defaults[name]:  # DINO's own
            return make(settings, *more)
        try:
            made = make(replace(settings), *more)  # a copy: what an entry writes there is lost
        except InputError:
            raise
        except Exception as error:  # a contestant's function may raise anything
            exit_if_full(error)
            said = f"--entry: {name} fails {place(error)} ({brief(repr(error))}): fix it"
            raise InputError(said) from None
        if not isinstance(made, kind):
            raise InputError(
                f"--entry: {name} returned {brief(repr(made))}: it must return a {kind.__name__}"
            )
        return made

    def read_images(self, settings: Settings, world: World) -> tuple[Images, None]:
        return self.images, None

    def make_loader(self, images: Images, settings: Settings, world: World) -> tuple:
        """Return loader and batches, as training.inputs.make_loader does."""
        if self.loaded is None:
            make_multicrop = partial(self.part, "make_multicrop", MultiCrop)
            self.loaded = inputs.make_loader(images, settings, world, make_multicrop)
        return self.loaded

    def start_run(self, settings: Settings, world: World) -> RunState:
        """Return a fresh run, as training.run_state.start_run does."""
        run = run_state.start_run(
            settings,
            world,
            make_head=self.make_head,
            make_backbone=self.make_backbone,
            make_loss=partial(self.part, "make_loss", nn.Module),
        )
        self.runs.append(run)
        return run

    def make_head(self, settings: Settings, embed_dim: int) -> nn.Module:
        """Return the entry's head."""
        head = self.part("make_head", nn.Module, settings, embed_dim)
        if settings.freeze_last_layer and not hasattr(head, "last_layer"):
            raise InputError(
                "--entry: the head of make_head has no last_layer to freeze in the first epoch: "
                "call its last layer so, or give --freeze_last_layer 0"
            )
        return head

    def make_backbone(self, settings: Settings, img_size: int) -> nn.Module:
        """Return the entry's network. img_size: always 0, the global crops'."""
        backbone = self.part("make_backbone", nn.Module, settings)
        if not hasattr(backbone, "embed_dim"):
            raise InputError("--entry: the network of make_backbone has no embed_dim: give it D")
        return backbone

    def cost_of_step(self, track: str, settings: Settings, world: World) -> float:
        """Return what a step takes from the budget, in TFLOP or in minutes."""
        loader, batches = self.make_loader(self.images, settings, world)
        self.start_run(settings, world)
        run = self.runs.pop()  # another than the one to be trained
        make_step = prepare_step(train.train_step, run, settings, world)
        now = train.schedules(settings, 0, batches.steps, batches.images_per_step)
        crops = crops_without_end(loader, batches)

        def next_batches() -> list[list[Tensor]]:
            found = []
            for _ in range(settings.accumulate):
                found.append([view.to(world.device) for view in next(crops)])
            return found

        def step(micro_batches: list[list[Tensor]]) -> None:
            metrics = make_step(
                run.student, run.teacher, run.dino_loss, run.optimizer,
                micro_batches, now, settings, world, update_teacher,
            )
            metrics.tolist()  # waits for a GPU

        if track == "embedded":
            first = next_batches()  # cropping is not counted
            return flops(lambda: step(first)) / 1e12
        for _ in range(WARMUP_STEPS):
            step(next_batches())
        began = time.perf_counter()
        for _ in range(TIMED_STEPS):
            step(next_batches())
        return (time.perf_counter() - began) / TIMED_STEPS / 60


def crops_without_end(loader, batches):
    """Yield micro-batches of crops, epoch after epoch."""
    while True:
        yield from loader
        batches.epoch += 1


def fit(settings: Settings, steps: int, most: int) -> tuple[int, int]:
    """Return epochs and steps an epoch, at most `most`, that make up the steps, or nearly.

    Schedules are written for whole epochs, so the last step of them ends all cosines.
    Raises InputError where a warm-up is longer than the training.
    """
    if steps < 1:
        raise InputError("the budget does not pay for one step: take a smaller network or batch")
    epochs = math.ceil(steps / most)
    for name in ("warmup_epochs", "warmup_teacher_temp_epochs"):
        if getattr(settings, name) > epochs:
            raise InputError(
                f"--{name} {getattr(settings, name):g} is longer than the training: the budget "
                f"pays for {steps} steps, and {most} are an epoch. Lower it"
            )
    return epochs, steps // epochs


class Outcome(NamedTuple):
    """k-NN accuracies in % of the trained network, of the same untrained and of raw pixels; what
    the training spent in TFLOP or minutes, and the steps' minutes."""

    knn: float
    untrained: float
    pixels: float
    spent: float
    minutes: float


def train_one(
    entry: Entry, settings: Settings, split: tuple[Images, Images], track: str, budget: float
) -> Outcome:
    """Train on the train images without labels, as far as the budget goes, and evaluate."""
    contest = Contest(entry, split[0])
    with hardware.start(settings.device, settings.precision, width=settings.width) as world:
        settings = replace(settings, precision=hardware.name_of(world.dtype))
        cost = contest.cost_of_step(track, settings, world)
    _, batches = contest.loaded
    epochs, batches.steps = fit(settings, int(budget / cost), batches.steps)
    settings = replace(settings, epochs=epochs)
    try:
        train.launch(settings, Hooks(contest.read_images, contest.make_loader, contest.start_run))
    except SystemExit as stopped:
        # by a signal: the training's own line promises too much for a race
        if stopped.code in (128 + signal.SIGINT, 128 + signal.SIGTERM):
            print("a race does not continue: the same command begins again, with the first seed")
        raise

    run = contest.runs[0]
    minutes = 0.0  # of the steps: neither of reading images nor of drawing figures
    for record in run.history[1:]:
        minutes += batches.steps * batches.images_per_step / record["images_per_s"] / 60
    spent = minutes
    if track == "embedded":
        spent = cost * epochs * batches.steps

    view = EvaluationView(settings.eval_size, settings.eval_crop, settings.mean, settings.std)
    with hardware.start(settings.device, settings.precision) as world:
        fresh = contest.start_run(settings, world)  # the seed's random weights again
        top1 = []
        for network in (run.teacher.backbone, fresh.teacher.backbone, Pixels()):
            features = extract(network, split, view, world)
            top1.append(knn_accuracies(features, world=world)[20][0])
    return Outcome(*top1, spent, minutes)


# -- the judge


def judges_images(
    track: str, data_path: str, settings: Settings, seed: int
) -> tuple[Images, Images]:
    """Return train and test images with labels. The creatures of each seed are others."""
    if track == "embedded":
        return draw_images(seed=seed)
    with hardware.start(settings.device, "fp32") as world:  # nothing is multiplied here
        images = inputs.read_images(replace(settings, data_path=data_path), world)
    split = knn_split(*images)
    if split is None:
        raise InputError(f"--data_path {data_path} has no class folders: the judge needs them")
    return split


def read_results(path: Path) -> list[dict]:
    """Return the entries of a race.jsonl, none where there is no file."""
    if not path.exists():
        return []
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:
        raise InputError(f"--results {path} cannot be read ({brief(error)}): fix it") from None
    for line in lines:
        if not isinstance(line, dict) or not COMPARED <= line.keys():
            raise InputError(f"--results {path} is not the race's: choose another file")
    return lines


def compare(line: dict, earlier: list[dict]) -> str:
    """Add difference and record to an entry's line, and return words about them.

    difference: points to the best earlier entry of the same track, images and budget, or None.
    record: whether it is above the spread, the larger of both entries' standard deviations.
    """
    line["difference"] = None
    line["record"] = True
    same = []
    for other in earlier:
        if all(other[key] == line[key] for key in ("track", "data", "budget")):
            same.append(other)
    if not same:
        return "the first entry with these images and this budget"

    best = max(same, key=lambda other: other["mean"])
    spread = max(best["spread"], line["spread"])
    line["difference"] = round(line["mean"] - best["mean"], 2)
    line["record"] = line["difference"] > spread
    verdict = "a new record" if line["record"] else "no record"
    return (
        f"{line['difference']:+.2f} points to {best['name']!r}, the best before; the larger "
        f"standard deviation is {spread:.2f}: {verdict}"
    )


def judge(flags: argparse.Namespace, words: list[str]) -> None:
    """Train the entry's seeds, print what came out, and append it to the results."""
    settings = read_settings(flags.track, words)
    entry = read_entry(flags.entry)
    results = Path(flags.results)
    read_results(results)  # an error now, not after the trainings
    results.parent.mkdir(parents=True, exist_ok=True)
    budget = BUDGETS[flags.track] if flags.budget is None else flags.budget
    unit = UNITS[flags.track]
    data = "creatures"
    if flags.data_path:
        data = Path(flags.data_path).resolve().name  # of "." too

    outcomes = []
    for seed in SEEDS:
        print(f"{flags.name}, seed {seed}", flush=True)
        split = judges_images(flags.track, flags.data_path, settings, seed)
        RUNS.mkdir(parents=True, exist_ok=True)
        folder = mkdtemp(prefix=f"{seed}-", dir=RUNS)  # fresh: an old run would be continued
        one = replace(settings, seed=seed, output_dir=folder)
        outcome = train_one(entry, one, split, flags.track, budget)
        if outcome.spent > TOLERANCE * budget:
            raise InputError(
                f"the training took {outcome.spent:.1f} of {budget:g} {unit} and is not entered: "
                "the machine was busier than in the first steps, so run it again"
            )
        print(
            f"seed {seed}: k-NN {outcome.knn:.1f} % (untrained {outcome.untrained:.1f}, raw pixels "
            f"{outcome.pixels:.1f}), {outcome.spent:.4g} {unit}",
            flush=True,
        )
        outcomes.append(outcome)

    knn = [round(outcome.knn, 2) for outcome in outcomes]
    line = {
        "track": flags.track,
        "name": flags.name,
        "data": data,
        "budget": budget,
        "unit": unit,
        "recipe": RECIPES[flags.track],
        "settings": " ".join(words),  # they change the recipe
        "entry": Path(flags.entry).name,
        "knn": knn,
        "mean": round(mean(knn), 2),
        "spread": round(stdev(knn), 2),
        "untrained": round(mean(outcome.untrained for outcome in outcomes), 2),
        "pixels": round(mean(outcome.pixels for outcome in outcomes), 2),
        "spent": round(mean(outcome.spent for outcome in outcomes), 4),
        "minutes": round(mean(outcome.minutes for outcome in outcomes), 1),
    }
    words_about_it = compare(line, read_results(results))
    print(f"\n{flags.name}: k-NN {line['mean']:.2f} % +- {line['spread']:.2f} over 3 seeds")
    print(f"untrained {line['untrained']:.2f} %, raw pixels {line['pixels']:.2f} %")
    print(words_about_it)
    append(results, line)


def append(path: Path, line: dict) -> None:
    """Add a line to the results. Raise InputError, with the line, if it cannot be written."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    except OSError as error:
        raise InputError(f"cannot write --results {path} ({error.strerror}): {line}") from None


def main(argv: list[str]) -> None:
    """Run the race's command line; what stands behind -- is the contestant's."""
    words = []
    if "--" in argv:
        place = argv.index("--")
        argv, words = argv[:place], argv[place + 1 :]
    parser = CommandLine(__doc__)
    parser.prog += " race"
    add = parser.add_argument
    add("--track", required=True, choices=tuple(BUDGETS))
    add("--name", required=True, help="of the entry")
    add("--entry", default="", help="a file with make_backbone, make_head, make_loss or "
        "make_multicrop")
    add("--budget", type=float, help="TFLOP of embedded [12], minutes of photos [10]")
    add("--data_path", default="", help="of photos: a folder of class folders")
    add("--results", default=str(RESULTS), help="the file that gets a line [classroom/race.jsonl]")
    with errors_in_one_line():
        flags = parser.parse_args(argv)
        if bool(flags.data_path) != (flags.track == "photos"):
            raise InputError("--data_path is for --track photos, which needs it")
        if flags.budget is not None and not 0 < flags.budget < math.inf:
            raise InputError(f"--budget {flags.budget} must be above 0 and finite")
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise InputError("the race is for one process: start it with python, not torchrun")
        judge(flags, words)
