"""The paper's ablations, and the methods it is compared with, as rows of one table (Sec. 5; appendix B to E).

    python -m ablations components --seeds 0 1 2            # on the embedded images, two to four minutes a row
    python -m ablations all --epochs 1                      # a first look at everything
    python -m ablations teachers --data_path imagenet/train --nproc_per_node 8 -- --accumulate 2
    python -m ablations collapse --data_path photos/ --preset small --epochs 20 -- --warmup_teacher_temp_epochs 5

The rows are data (rows.py). Each is a run of ablations/train.py, whose flags are the preset's, changed by the study's
base, by --data_path and --epochs, by what stands behind --, and last by the row itself. Finished runs are skipped,
stopped ones go on, and equal runs of several rows are one; a run that fails is told and left out. Then follows the
linear evaluation where the paper has one, and the paper's numbers stand beside these, mean and standard deviation over
the seeds, those of earlier calls among them: --output_dir gets raw lines, table and figure under the study's name. The
paper's numbers are of ImageNet: compare orders and collapses, not values. Speed and memory (patch_size, crops, heads)
are measured once, so let the machine be idle then; without a run's costs.json they are measured again.
"""
import argparse
import json
import sys
from pathlib import Path

import torch

from ablations import report as ablation_report
from ablations.rows import STUDIES, as_flags
from ablations.runs import Run, alone, execute, launch, make_run, read_lines, read_objects, train_all
from ablations.train import parse
from bench import measure, step
from data import open_images
from runtime import hardware
from runtime.commandline import CommandLine, InputError, errors_in_one_line, write_whole
from training import report

KEYS = ("knn_teacher", "knn_student", "train_entropy", "train_kl", "images_per_s")  # of an epoch, in log.txt


def raw_line(run: Run, preset: str) -> dict:
    """What the JSON keeps of a finished run: the row, its settings, and lists of its epochs' values; the curves of
    entropy and KL have up to 20 values an epoch."""
    baselines, *epochs = read_lines(run.folder / "log.txt")
    settings = run.settings
    line = {"row": run.row.name, "seed": run.seed, "changes": run.row.changes(preset), "settings": run.changed,
            "preset": preset, "data": settings.dataset or Path(settings.data_path).name or "embedded images",
            "folder": run.folder.parent.name, "out_dim": settings.out_dim, "untrained": baselines.get("knn_untrained"),
            "verdict": report.collapse(epochs[-1], settings.out_dim).partition(":")[0]}
    curves = {key: [round(value, 4) for record in epochs for value in record.get(key, [])]
              for key in ("entropy_curve", "kl_curve")}
    values = {key: [round(record[key], 4) if key in record else None for record in epochs] for key in KEYS}
    return line | values | curves


def evaluated(name: str, run: Run, flags: argparse.Namespace, signals: list[int], *more: str,
              **settings) -> dict | None:
    """What evals/NAME.py measured of a finished run, which is done once; None if it fails."""
    results = run.folder / f"eval_{name}.jsonl"
    with alone(run.folder, signals):
        if not read_lines(results):  # a full disk leaves an empty one
            data = {key: getattr(run.settings, key) for key in ("dataset", "data_path", "device", "num_workers")
                    if getattr(run.settings, key) != ""}
            command = launch(["-m", f"evals.{name}"], flags) + as_flags(data | settings | {"results": results})
            if execute([*command, *more], signals):
                return None
        return read_lines(results)[-1]


def linear(run: Run, flags: argparse.Namespace, signals: list[int]) -> dict | None:
    """The linear evaluation's top-1 in %, of centre views' features; nothing where the paper has none; None if it
    fails."""
    if "linear" not in run.row.paper or "knn_teacher" not in read_lines(run.folder / "log.txt")[-1]:
        return {}
    line = evaluated("linear", run, flags, signals, cached=True, seed=run.seed,
                     pretrained_weights=run.folder / "checkpoint.pth")
    return line and {"linear": max(value for name, value in line["measured"].items() if "top-1" in name)}


def costs(run: Run, signals: list[int]) -> dict[str, float | None]:
    """Those of report's COSTS that stand beside the row's numbers (mib: None where the system does not tell); nothing
    if the steps do not fit. They are measured once, in a fresh process, and kept in the run's folder."""
    settings, kept = run.settings, run.folder / "costs.json"
    wanted = [cost for cost, (name, _) in ablation_report.COSTS.items() if name in run.row.paper]
    if not wanted:
        return {}
    with alone(run.folder, signals):
        found = next(iter(read_lines(kept)), {})
        if not set(wanted) <= found.keys():
            print(f"measuring what {run.row.name} costs, some 15 s")
            try:
                with hardware.start(settings.device, settings.precision) as world:
                    found = measure.in_fresh_process(step.cost_of_steps, step.make_ours, settings, world,
                                                     torch.get_num_threads(), 7, 15.0)
            except MemoryError:
                return {}
            found["train_per_s"] = 1000 * settings.batch_size_per_gpu / found["ms"]
            write_whole(kept, lambda part: part.write_text(json.dumps(found) + "\n"))
    return {name: found[name] for name in wanted}


def tell(output: Path, name: str, lines: list[dict], grid: list[list[str]], remarks: list[str]) -> None:
    """Write a study's raw lines, an item a line of STUDY.json, and its table as STUDY.md, which is printed too."""
    text = "\n".join([ablation_report.markdown(grid), *remarks])
    write_whole(output / f"{name}.json",
                lambda part: part.write_text("[\n" + ",\n".join(map(json.dumps, lines)) + "\n]\n"))
    write_whole(output / f"{name}.md", lambda part: part.write_text(text + "\n", encoding="utf-8"))
    print(text)


def earlier(path: Path, planned: list[Run], now: list[dict]) -> list[dict]:
    """Raw lines of earlier calls that hold still: of rows as they are planned now, and of seeds that have no new one.

    planned: all runs of the study, also those that failed; now: this call's raw lines.
    """
    lines = read_objects(path, json.loads, "remove it; the runs stay")
    folders = {(run.row.name, run.folder.parent.name) for run in planned}  # a folder's name stands for its settings
    new = {(line["row"], line["seed"]) for line in now}
    return [line for line in lines if (line.get("row"), line.get("folder")) in folders
            and (line["row"], line["seed"]) not in new]


def show(name: str, planned: list[Run], done: list[Run], flags: argparse.Namespace, signals: list[int]) -> list[str]:
    """A study's raw lines, figure and table, none if no run is done -> a line for each evaluation that failed."""
    study, output, lines, failed = STUDIES[name], Path(flags.output_dir), [], []
    for run in done:
        top_1 = linear(run, flags, signals)
        if top_1 is None:
            failed.append(f"the linear evaluation of {run.row.name}, seed {run.seed} failed: its own words are above")
        lines.append(raw_line(run, flags.preset) | costs(run, signals) | (top_1 or {}))
    if not lines:
        return failed
    with alone(output, signals):
        lines += earlier(output / f"{name}.json", planned, lines)
        ablation_report.draw(output / f"{name}.png", name, study, lines)
        rows = [ablation_report.cells(row, lines, flags.preset) for row in study.rows]
        tell(output, name, lines, [list(ablation_report.HEAD), *rows], ablation_report.surprises(study, lines))
    return failed


def supervised(run: Run, flags: argparse.Namespace, signals: list[int]) -> dict | None:
    """Train a finished run's network with labels too, and score the masks of both if the images have masks (Fig. 4).

    -> what the last evaluation measured; None if it failed.
    """
    settings, trained = run.settings, run.folder / "supervised"
    network = {name: getattr(settings, name) for name in ("arch", "patch_size", "num_heads", "init_std", "eval_size")}
    line = evaluated("transfer", run, flags, signals, "--from_scratch", **network, seed=run.seed,
                     output_dir=trained)
    if line and (settings.dataset == "oxford_pets" or not (settings.dataset or settings.data_path)):
        line = evaluated("attention_segmentation", run, flags, signals, seed=run.seed,
                         pretrained_weights=run.folder / "checkpoint.pth",
                         supervised_weights=trained / "checkpoint.pth")
    kept = ("table", "arch", "patch_size", "data", "measured")  # not the paths of this machine
    return line and {"row": run.row.name, "seed": run.seed, "folder": run.folder.parent.name,
                     **{name: line[name] for name in kept}}


def show_masks(planned: list[Run], done: list[Run], flags: argparse.Namespace, signals: list[int]) -> list[str]:
    """The same of Fig. 4: raw lines, masks of this call's first seed side by side, and the table."""
    found = [(run, supervised(run, flags, signals)) for run in done]
    failed = [f"the supervised network of seed {run.seed} failed: its own words are above"
              for run, line in found if line is None]
    if not (found := [(run, line) for run, line in found if line]):
        return failed
    run, lines, output = found[0][0], [line for _, line in found], Path(flags.output_dir)
    train, val = open_images(run.settings.data_path, run.settings.dataset, run.settings.download)
    images = val or train
    some = torch.linspace(0, len(images) - 1, min(8, len(images))).long()
    weights = {"supervised": run.folder / "supervised" / "checkpoint.pth", "DINO": run.folder / "checkpoint.pth"}
    names = lines[0]["measured"].keys()
    paper = {name: str(run.row.paper[name.rpartition(": ")[2]]) for name in names if name.startswith("best head")}
    with alone(output, signals):
        lines += earlier(output / "supervised.json", planned, lines)
        ablation_report.draw_masks(output / "supervised.png", weights, images.subset(some))
        rows = [[name, paper.get(name, "-"), ablation_report.spread([line["measured"][name] for line in lines])]
                for name in names]
        tell(output, "supervised", lines, [[lines[0]["table"], "the paper's", "here"], *rows], [])
    return failed


def conduct(name: str, runs: list[Run], flags: argparse.Namespace, signals: list[int]) -> list[str]:
    """Train a study's rows and show what came out -> a line for each failure."""
    done, failed = train_all(runs, signals)
    print(f"\n{name}: {STUDIES[name].where}. {STUDIES[name].note}\n")
    if name == "supervised":
        return failed + show_masks(runs, done, flags, signals)
    return failed + show(name, runs, done, flags, signals)


def parse_flags(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line -> checked flags; more: ablations/train.py's, from behind --."""
    parser = CommandLine(__doc__)
    add = parser.add_argument
    add("study", choices=(*STUDIES, "all"), metavar="study", help=f"{', '.join(STUDIES)}, or all of them")
    add("--preset", default="", help="of train.py; default: demo without data, vits16 with data")
    add("--data_path", default="", help="a folder of images; without it the embedded ones")
    add("--seeds", type=int, nargs="+", default=[0], help="a run of each row with each [0]")
    add("--epochs", type=int, default=0, help="of the rows that do not say their own; 0: as the study says [0]")
    add("--output_dir", default="runs/ablations", help="gets the runs, and STUDY.json, .md and .png [runs/ablations]")
    add("--nproc_per_node", type=int, default=1, help="processes of each run, started by torchrun [1]")
    argv = sys.argv[1:] if argv is None else argv
    split = argv.index("--") if "--" in argv else len(argv)
    flags = parser.parse_args(argv[:split])
    flags.more = argv[split + 1:]
    for name in ("preset", "seed", "output_dir"):  # argparse would take the last one of two
        if f"--{name}" in [part.partition("=")[0] for part in flags.more]:
            raise InputError(f"--{name} stands behind --, but each row has its own: move it before, or leave it out")
    if flags.nproc_per_node < 1:
        raise InputError(f"--nproc_per_node {flags.nproc_per_node} must be at least 1")
    if len(set(flags.seeds)) < len(flags.seeds):
        raise InputError(f"--seeds {' '.join(map(str, flags.seeds))} has one twice, the same run: leave it out")
    if flags.data_path:
        flags.data_path = str(Path(flags.data_path).resolve())  # equal runs from wherever they are started
    data = as_flags({"data_path": flags.data_path}) if flags.data_path else []
    flags.preset = flags.preset or parse([*data, *flags.more]).preset
    return flags


def main(argv: list[str] | None = None) -> None:
    with errors_in_one_line():
        flags = parse_flags(argv)
        names = list(STUDIES) if flags.study == "all" else [flags.study]
        plan = {name: [make_run(STUDIES[name], row, seed, flags) for row in STUDIES[name].rows for seed in flags.seeds]
                for name in names}  # so that a wrong flag is told before the first hour, and so are folders
        settings = next(iter(plan.values()))[0].settings
        open_images(settings.data_path, settings.dataset, settings.download)
        write_whole(Path(flags.output_dir, "command.txt"),
                    lambda part: part.write_text(" ".join(sys.argv) + "\n", errors="surrogateescape"))
        with hardware.stop_signals() as signals:
            failed = [line for name, runs in plan.items() for line in conduct(name, runs, flags, signals)]
        if failed:
            print(*failed, sep="\n", file=sys.stderr)
            sys.exit(1)


if __name__ == "__main__":
    main()
