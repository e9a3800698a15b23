"""The paper's ablations, and the methods it is compared with, as tables (Sec. 5; appendix B to E).

    python -m ablations components --seeds 0 1 2    # the embedded images, two to four minutes a row
    python -m ablations components --rows 1 2 4     # three rows of the table alone
    python -m ablations all --epochs 1              # a first look at everything
    python -m ablations teachers --data_path imagenet/train --nproc_per_node 8 -- --accumulate 2
    python -m ablations collapse --data_path photos/ --preset small --epochs 20

The rows are data (rows.py). Each is a run of ablations/train.py. Its flags are the preset's,
changed by the study's base, by --data_path and --epochs, by what stands behind --, and last by the
row. Finished runs are skipped, stopped ones are continued, and equal runs of several rows are one.
A run that fails is reported and left out.

Then follows the linear evaluation where the paper has one. --output_dir gets raw lines, table and
figure under the study's name: the paper's numbers beside these, mean and standard deviation over
the seeds, those of earlier calls among them. The paper's numbers are of ImageNet: compare orders
and collapses, not values. Speed and memory (patch_size, crops, heads) are measured once, so let the
machine be idle then; without a run's costs.json they are measured again.
"""

import argparse
import errno
import json
import sys
from dataclasses import fields
from pathlib import Path

from ablations import report as ablation_report
from ablations.rows import STUDIES, as_flags
from ablations.runs import (
    Run,
    alone,
    execute,
    launch,
    make_run,
    read_lines,
    read_objects,
    train_all,
)
from ablations.train import parse
from data import evenly_spaced, open_images
from runtime import hardware
from runtime.commandline import CommandLine, InputError, errors_in_one_line, write_whole
from settings import Settings
from training import report

# exit statuses of the bench: its own, and that of a process which Linux kills to get memory
FULL_MEMORY = (errno.ENOMEM, -9)
KEYS = ("knn_teacher", "knn_student", "train_entropy", "train_kl", "images_per_s")  # in log.txt


def data_name(settings: Settings) -> str:
    """Return what a run's images are called in its line."""
    if settings.data_path and not settings.dataset:
        return Path(settings.data_path).resolve().name  # of "." too
    return settings.dataset or "embedded images"


def raw_line(run: Run, preset: str) -> dict:
    """Return what the JSON keeps of a finished run: row, settings, and lists of epochs' values.

    The curves of entropy and KL have up to 20 values an epoch.
    """
    baselines, *epochs = read_lines(run.folder / "log.txt")
    settings = run.settings
    line = {
        "row": run.row.name,
        "seed": run.seed,
        "changes": run.row.changes(preset),
        "settings": run.changed,
        "preset": preset,
        "data": data_name(settings),
        "folder": run.folder.parent.name,
        "out_dim": settings.out_dim,
        "untrained": baselines.get("knn_untrained"),
        "verdict": report.collapse(epochs[-1], settings.out_dim).partition(":")[0],
    }
    for key in KEYS:
        line[key] = [round(one[key], 4) if key in one else None for one in epochs]
    for key in ("entropy_curve", "kl_curve"):
        line[key] = [round(value, 4) for one in epochs for value in one.get(key, [])]
    return line


def evaluated(
    name: str, run: Run, flags: argparse.Namespace, signals: list[int], *more: str, **settings
) -> dict | None:
    """Return what evals/NAME.py measured of a finished run, once; None if it fails."""
    results = run.folder / f"eval_{name}.jsonl"
    with alone(run.folder, signals):
        if not read_lines(results):  # a full disk leaves an empty one
            data = {}
            for key in ("dataset", "data_path", "device", "num_workers"):
                if getattr(run.settings, key) != "":
                    data[key] = getattr(run.settings, key)
            command = launch(["-m", f"evals.{name}"], flags)
            command += as_flags(data | settings | {"results": results})
            if execute([*command, *more], signals):
                return None
        return read_lines(results)[-1]


def linear(run: Run, flags: argparse.Namespace, signals: list[int]) -> dict | None:
    """Return the linear evaluation's top-1 in %, of centre views' features.

    Of few images that of the untrained network too. {} where the paper has none; None if it fails.
    """
    last = read_lines(run.folder / "log.txt")[-1]
    if "linear" not in run.row.paper or "knn_teacher" not in last:
        return {}
    weights = run.folder / "checkpoint.pth"
    line = evaluated(
        "linear", run, flags, signals, cached=True, seed=run.seed, pretrained_weights=weights
    )
    if line is None:
        return None
    trained, untrained = [], []
    for name, value in line["measured"].items():
        if "top-1" in name:
            values = untrained if name.startswith("untrained") else trained
            values.append(value)
    found = {"linear": max(trained)}
    if untrained:
        found["linear_untrained"] = max(untrained)
    return found


def costs(run: Run, signals: list[int]) -> dict[str, float | None]:
    """Return those of report's COSTS that the paper has for this row; {} if the memory is full.

    They are measured once, and kept in the run's folder. mib is None where the system does not
    give it. Raises InputError if the bench fails for another reason.
    """
    wanted = [cost for cost, (name, _) in ablation_report.COSTS.items() if name in run.row.paper]
    if not wanted:
        return {}
    kept = run.folder / "costs.json"
    with alone(run.folder, signals):
        found = next(iter(read_lines(kept)), {})
        if not set(wanted) <= found.keys():
            print(f"measuring what {run.row.name} costs, some 15 s")
            status = execute(cost_command(run), signals)
            if status in FULL_MEMORY:
                return {}
            if status:
                raise InputError(
                    f"measuring what {run.row.name} costs failed with exit status {status}: its "
                    "own words are above; the runs stay, and the same command continues there"
                )
            found = read_lines(kept)[0]
    return {name: found[name] for name in wanted}


def cost_command(run: Run) -> list[str]:
    """Return the bench's command that writes the run's costs.json, of DINO's own settings."""
    settings = {one.name: getattr(run.settings, one.name) for one in fields(Settings)}
    settings["output_dir"] = run.folder
    return [sys.executable, "-m", "bench.cost", *as_flags(settings)]


def write_study(
    output: Path, name: str, lines: list[dict], grid: list[list[str]], remarks: list[str]
) -> None:
    """Write a study's raw lines as STUDY.json, and its table as STUDY.md, which is printed too."""
    objects = ",\n".join(map(json.dumps, lines))
    text = "\n".join([ablation_report.markdown(grid), *remarks])
    write_whole(output / f"{name}.json", lambda part: part.write_text(f"[\n{objects}\n]\n"))
    write_whole(output / f"{name}.md", lambda part: part.write_text(text + "\n", encoding="utf-8"))
    print(text)


def earlier(path: Path, planned: list[Run], now: list[dict]) -> list[dict]:
    """Return the raw lines of earlier calls that still hold.

    They are of rows as they are planned now, and of seeds that have no new line.
    planned: all runs of the study, also those that failed; now: this call's raw lines.
    """
    lines = read_objects(path, json.loads, "remove it; the runs stay")
    # a folder's name stands for its settings
    folders = {(run.row.name, run.folder.parent.name) for run in planned}
    new = {(line["row"], line["seed"]) for line in now}
    kept = []
    for line in lines:
        row, folder = line.get("row"), line.get("folder")
        if (row, folder) in folders and (row, line["seed"]) not in new:
            kept.append(line)
    return kept


def show(
    name: str, planned: list[Run], done: list[Run], flags: argparse.Namespace, signals: list[int]
) -> list[str]:
    """Write a study's raw lines, figure and table; return a line for each failed evaluation."""
    study, output = STUDIES[name], Path(flags.output_dir)
    lines, failed = [], []
    for run in done:
        top1 = linear(run, flags, signals)
        if top1 is None:
            which = f"the linear evaluation of {run.row.name}, seed {run.seed}"
            failed.append(f"{which} failed: its own words are above")
            top1 = {}
        lines.append(raw_line(run, flags.preset) | costs(run, signals) | top1)
    if not lines:
        return failed
    with alone(output, signals):
        lines += earlier(output / f"{name}.json", planned, lines)
        ablation_report.draw(output / f"{name}.png", name, study, lines)
        rows = [ablation_report.cells(row, lines, flags.preset) for row in study.rows]
        remarks = ablation_report.surprises(study, lines)
        write_study(output, name, lines, [list(ablation_report.HEAD), *rows], remarks)
    return failed


def supervised(run: Run, flags: argparse.Namespace, signals: list[int]) -> dict | None:
    """Train a finished run's network with labels too, and score both masks if there are masks.

    Return what the last evaluation measured (Fig. 4); None if it failed.
    """
    settings, trained = run.settings, run.folder / "supervised"
    network = {}
    for name in ("arch", "patch_size", "num_heads", "init_std", "eval_size"):
        network[name] = getattr(settings, name)
    options = network | {"seed": run.seed, "output_dir": trained}
    line = evaluated("transfer", run, flags, signals, "--from_scratch", **options)

    embedded = not settings.dataset and not settings.data_path
    if line and (embedded or settings.dataset == "oxford_pets"):
        weights = {
            "pretrained_weights": run.folder / "checkpoint.pth",
            "supervised_weights": trained / "checkpoint.pth",
        }
        line = evaluated("attention_segmentation", run, flags, signals, seed=run.seed, **weights)
    if line is None:
        return None
    kept = {"row": run.row.name, "seed": run.seed, "folder": run.folder.parent.name}
    for name in ("table", "arch", "patch_size", "data", "measured"):  # no paths of this machine
        kept[name] = line[name]
    return kept


def show_masks(
    planned: list[Run], done: list[Run], flags: argparse.Namespace, signals: list[int]
) -> list[str]:
    """Do the same for Fig. 4: raw lines, the first seed's masks side by side, and the table."""
    lines, shown, failed = [], [], []
    for run in done:
        line = supervised(run, flags, signals)
        if line is None:
            which = f"the supervised network of seed {run.seed}"
            failed.append(f"{which} failed: its own words are above")
        else:
            lines.append(line)
            shown.append(run)
    if not lines:
        return failed

    run, output = shown[0], Path(flags.output_dir)
    settings = run.settings
    source = (settings.data_path, settings.dataset, settings.download)
    train, val = open_images(*source, levels=settings.levels)
    images = val or train
    images = images.subset(evenly_spaced(len(images), 8))
    weights = {
        "supervised": run.folder / "supervised" / "checkpoint.pth",
        "DINO": run.folder / "checkpoint.pth",
    }
    names = lines[0]["measured"].keys()
    with alone(output, signals):
        lines += earlier(output / "supervised.json", planned, lines)
        ablation_report.draw_masks(output / "supervised.png", weights, images)
        rows = [[lines[0]["table"], "the paper's", "here"]]
        for name in names:
            paper = "-"
            if name.startswith("best head"):
                paper = str(run.row.paper[name.rpartition(": ")[2]])
            here = ablation_report.spread([line["measured"][name] for line in lines])
            rows.append([name, paper, here])
        write_study(output, "supervised", lines, rows, [])
    return failed


def conduct(
    name: str, planned: list[Run], flags: argparse.Namespace, signals: list[int]
) -> list[str]:
    """Train a study's rows and show what came out; return a line for each failure.

    planned: all runs of the study; of these --rows are trained.
    """
    study = STUDIES[name]
    chosen = study.rows
    if flags.rows:
        chosen = [study.rows[number - 1] for number in flags.rows]
    runs = [run for run in planned if run.row in chosen]
    done, failed = train_all(runs, signals)
    print(f"\n{name}: {study.where}. {study.note}\n")
    if name == "supervised":
        return failed + show_masks(planned, done, flags, signals)
    return failed + show(name, planned, done, flags, signals)


def parse_flags(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the checked flags; more: those of ablations/train.py, from behind --."""
    parser = CommandLine(__doc__)
    add = parser.add_argument
    studies = f"{', '.join(STUDIES)}, or all of them"
    add("study", choices=(*STUDIES, "all"), metavar="study", help=studies)
    add("--preset", default="", help="of train.py; default: by the data, and lab without any")
    add("--data_path", default="", help="a folder of images; without it the embedded ones")
    add(
        "--rows",
        type=int,
        nargs="+",
        default=[],
        help="only these, counted from 1 in rows.py's order [all]",
    )
    add("--seeds", type=int, nargs="+", default=[0], help="a run of each row with each [0]")
    add(
        "--epochs",
        type=int,
        default=0,
        help="of the rows that do not say their own; 0: as the study says [0]",
    )
    add(
        "--output_dir",
        default="runs/ablations",
        help="gets the runs, and STUDY.json, .md and .png [runs/ablations]",
    )
    add("--nproc_per_node", type=int, default=1, help="processes of a run, by torchrun [1]")

    argv = sys.argv[1:] if argv is None else argv
    split = argv.index("--") if "--" in argv else len(argv)
    flags = parser.parse_args(argv[:split])
    flags.more = argv[split + 1 :]
    given = [part.partition("=")[0] for part in flags.more]
    for name in ("preset", "seed", "output_dir"):  # each row sets these itself
        if f"--{name}" in given:
            fix = "move it before, or leave it out"
            raise InputError(f"--{name} stands behind --, but each row has its own: {fix}")
    if not 1 <= flags.nproc_per_node <= 1024:
        raise InputError(
            f"--nproc_per_node {flags.nproc_per_node} must be at least 1 and at most 1024"
        )
    if flags.rows and flags.study == "all":
        raise InputError("--rows are of one study: name it, or leave --rows out")
    for number in flags.rows:
        rows = STUDIES[flags.study].rows
        if not 1 <= number <= len(rows):
            names = ", ".join(f"{i}: {row.name}" for i, row in enumerate(rows, 1))
            raise InputError(f"--rows {number} is not there: choose of {names}")
    if min(flags.seeds) < 0:
        raise InputError(f"--seeds {min(flags.seeds)} must be at least 0")
    for name in ("rows", "seeds"):
        values = getattr(flags, name)
        if len(set(values)) < len(values):
            words = " ".join(map(str, values))
            raise InputError(f"--{name} {words} has one twice, the same run: leave it out")

    if flags.preset == "demo":
        raise InputError(
            "--preset demo is not for studies: take lab, with which the rows' settings were sought"
        )

    data = []
    if flags.data_path:
        flags.data_path = str(Path(flags.data_path).resolve())  # the same run from any folder
        data = ["--data_path", flags.data_path]
    if not flags.preset:
        flags.preset = parse([*data, *flags.more]).preset
        if flags.preset == "demo":  # there are no data
            flags.preset = "lab"
    return flags


def main(argv: list[str] | None = None) -> None:
    with errors_in_one_line():
        flags = parse_flags(argv)
        names = list(STUDIES) if flags.study == "all" else [flags.study]
        plan = {}  # all of it first: a wrong flag is reported before the first hour, not after
        for name in names:
            study = STUDIES[name]
            plan[name] = []
            for row in study.rows:
                plan[name] += [make_run(study, row, seed, flags) for seed in flags.seeds]
        settings = plan[names[0]][0].settings
        # can they be opened? asked before the first hour, too
        open_images(settings.data_path, settings.dataset, settings.download)
        command = " ".join(sys.argv) + "\n"
        write_whole(
            Path(flags.output_dir, "command.txt"),
            lambda part: part.write_text(command, errors="surrogateescape"),
        )
        failed = []
        with hardware.stop_signals() as signals:
            for name, runs in plan.items():
                failed += conduct(name, runs, flags, signals)
        if failed:
            print(*failed, sep="\n", file=sys.stderr)
            sys.exit(1)


if __name__ == "__main__":
    main()
