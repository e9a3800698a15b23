"""The paper's ablations, and the methods it is compared with, as rows of one table (Sec. 5; appendix B to E).

    python ablations.py components --seeds 0 1 2            # on the embedded pictures, two to three minutes a row
    python ablations.py all --epochs 1                      # a first look at everything
    python ablations.py teachers --data_path imagenet/train --nproc_per_node 8 -- --accumulate 2
    python ablations.py collapse --data_path photos/ --preset small --epochs 20 -- --warmup_teacher_temp_epochs 5

The rows are data (ablation_rows.py). Each is a run of train.py, whose flags are the preset's, changed by the study's
base, by --data_path and --epochs, by what stands behind --, and last by the row itself. Finished runs are skipped,
stopped ones go on, and equal runs of several rows are one; a run that fails is told and left out. Then the paper's
numbers stand beside these, mean and standard deviation over the seeds, and --output_dir gets the raw lines, the table
and the figure under the study's name. The paper's numbers are of ImageNet: compare orders and collapses, not values.
"""
import argparse
import json
import subprocess
import sys
import time
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch

import ablation_report
import bench_step
import hardware
import measure
import report
from ablation_rows import STUDIES, Row, Study, as_flags
from checkpoint import write_whole
from commandline import CommandLine, InputError, errors_in_one_line
from data import open_pictures
from run_state import MAY_DIFFER
from settings import Settings, parse_settings

KEYS = ("knn_teacher", "knn_student", "train_entropy", "train_kl", "images_per_s")  # of an epoch, in log.txt


class Run(NamedTuple):
    """One row with one seed: its settings, its folder, and the command that trains it."""

    row: Row
    seed: int
    settings: Settings
    folder: Path
    command: list[str]


def launch(script: str, flags: argparse.Namespace) -> list[str]:
    """The start of a command: plain Python, or as many processes as asked for."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={flags.nproc_per_node}"]
    return [sys.executable, *torchrun * (flags.nproc_per_node > 1), str(Path(__file__).with_name(script))]


def make_run(study: Study, row: Row, seed: int, flags: argparse.Namespace) -> Run:
    """A run with checked settings; its folder is named after what they come to, so that equal runs have the same."""
    given = {name: getattr(flags, name) for name in ("data_path", "epochs") if getattr(flags, name)}
    base = {"preset": flags.preset, "saveckp_freq": 0} | study.shared(flags.preset) | given
    line = [*as_flags(base), *flags.more, *as_flags(row.changes(flags.preset) | {"seed": seed})]
    settings, defaults = parse_settings(line), asdict(Settings())
    changed = {name: value for name, value in asdict(settings).items()
               if value != defaults[name] and name not in (*MAY_DIFFER, "seed")}
    key = zlib.crc32(json.dumps([changed, flags.nproc_per_node], sort_keys=True).encode())
    folder = Path(flags.output_dir, f"{key:08x}", f"seed{seed}")
    return Run(row, seed, settings, folder, [*launch("train.py", flags), *line, "--output_dir", str(folder)])


def read_log(run: Run) -> list[dict]:
    """The lines of the run's log.txt, the baselines first; none if it has not begun."""
    path = run.folder / "log.txt"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def finished(run: Run) -> bool:
    """Whether all epochs are done, and the last one's k-NN if the pictures have labels."""
    log = read_log(run)
    return bool(log) and log[-1]["epoch"] + 1 >= run.settings.epochs and (
        "knn_untrained" not in log[0] or "knn_teacher" in log[-1])


def execute(command: list[str], signals: list[int]) -> int:
    """A command to its end -> its exit status. A signal is passed on as SIGTERM; then this exits."""
    process, passed_on = subprocess.Popen(command), False
    while process.poll() is None:
        time.sleep(0.1)
        if signals and not passed_on:
            process.terminate()
            passed_on = True
    if signals:
        print("stopped; the same command goes on there")
        sys.exit(128 + signals[0])
    return process.returncode


def train_all(runs: list[Run], signals: list[int]) -> tuple[list[Run], list[str]]:
    """Train what is not finished -> the runs that are, and a line for each that failed."""
    failed: dict[Path, str] = {}
    for i, run in enumerate(runs, start=1):
        if finished(run) or run.folder in failed:
            continue
        print(f"\n{i}/{len(runs)} {run.row.name}, seed {run.seed}: {run.folder}", flush=True)
        if status := execute(run.command, signals):
            failed[run.folder] = (f"{run.row.name}, seed {run.seed} failed with exit status {status} and is left out: "
                                  "its own words are above")
            print(failed[run.folder], flush=True)
    return [run for run in runs if finished(run)], list(failed.values())


def memory(settings: Settings) -> float | None:
    """The MiB of two steps in a fresh process; None where the system does not tell, or they do not fit."""
    with hardware.start(settings.device, settings.precision) as where:
        try:
            return measure.in_fresh_process(bench_step.cost_of_steps, bench_step.make_ours, settings, where,
                                            torch.get_num_threads())["mib"]
        except MemoryError:
            return None


def raw_line(run: Run, preset: str) -> dict:
    """What the JSON keeps of a finished run: the row, its changes, and lists of its epochs' values."""
    baselines, *epochs = read_log(run)
    settings = run.settings
    line = {"row": run.row.name, "seed": run.seed, "changes": run.row.changes(preset), "preset": preset,
            "data": settings.dataset or Path(settings.data_path).name or "embedded pictures",
            "folder": run.folder.parent.name, "out_dim": settings.out_dim, "untrained": baselines.get("knn_untrained"),
            "verdict": report.collapse(epochs[-1], settings.out_dim).partition(":")[0]}
    if "GiB" in run.row.paper:
        line["mib"] = memory(settings)
    return line | {key: [round(record[key], 4) if key in record else None for record in epochs] for key in KEYS}


def tell(output: Path, name: str, lines: list[dict], grid: list[list[str]], remarks: list[str]) -> None:
    """Write a study's raw lines, an item a line of STUDY.json, and its table as STUDY.md, which is printed too."""
    text = "\n".join([ablation_report.markdown(grid), *remarks])
    write_whole(output / f"{name}.json",
                lambda part: part.write_text("[\n" + ",\n".join(map(json.dumps, lines)) + "\n]\n"))
    write_whole(output / f"{name}.md", lambda part: part.write_text(text + "\n", encoding="utf-8"))
    print(text)


def show(name: str, runs: list[Run], flags: argparse.Namespace) -> None:
    """A study's raw lines, figure and table; nothing if no run is finished."""
    if not runs:
        return
    study, output, lines = STUDIES[name], Path(flags.output_dir), [raw_line(run, flags.preset) for run in runs]
    ablation_report.draw(output / f"{name}.png", name, study, lines)
    rows = [ablation_report.cells(row, lines, flags.preset) for row in study.rows]
    tell(output, name, lines, [list(ablation_report.HEAD), *rows], ablation_report.surprises(study, lines))


def supervised(run: Run, flags: argparse.Namespace, signals: list[int]) -> dict | None:
    """Train a finished run's network with labels too, and score the masks of both if the pictures have masks (Fig. 4).

    -> the evaluation's line of --results; None if a command failed.
    """
    settings, results = run.settings, run.folder / "results.jsonl"
    shared = {name: getattr(settings, name) for name in ("dataset", "data_path", "device", "num_workers")
              if getattr(settings, name) != ""} | {"seed": run.seed, "results": results}
    network = {name: getattr(settings, name) for name in ("arch", "patch_size", "num_heads", "init_std", "eval_size")}
    commands = [launch("eval_transfer.py", flags) + ["--from_scratch"]
                + as_flags(shared | network | {"output_dir": run.folder / "supervised"})]
    if settings.dataset == "oxford_pets" or not (settings.dataset or settings.data_path):
        weights = {"pretrained_weights": run.folder / "checkpoint.pth",
                   "supervised_weights": run.folder / "supervised" / "checkpoint.pth"}
        commands.append(launch("eval_attention_segmentation.py", flags) + as_flags(shared | weights))
    if any(execute(command, signals) for command in commands):
        return None
    return {"seed": run.seed, **json.loads(results.read_text().splitlines()[-1])}


def show_masks(runs: list[Run], lines: list[dict], output: Path) -> None:
    """The same of Fig. 4: raw lines, the first seed's masks side by side, and the table."""
    settings, folder = runs[0].settings, runs[0].folder
    train, val = open_pictures(settings.data_path, settings.dataset)
    pictures = val or train
    some = torch.linspace(0, len(pictures) - 1, min(8, len(pictures))).long()
    ablation_report.draw_masks(output / "supervised.png", {"supervised": folder / "supervised" / "checkpoint.pth",
                                                           "DINO": folder / "checkpoint.pth"}, pictures.subset(some))
    paper = {name: str(runs[0].row.paper[name.rpartition(": ")[2]]) for name in lines[0]["measured"]
             if name.startswith("best head")}
    rows = [[name, paper.get(name, "-"), ablation_report.spread([line["measured"][name] for line in lines])]
            for name in lines[0]["measured"]]
    tell(output, "supervised", lines, [[lines[0]["table"], "the paper's", "here"], *rows], [])


def conduct(name: str, runs: list[Run], flags: argparse.Namespace, signals: list[int]) -> list[str]:
    """Train a study's rows and show what came out -> a line for each failure."""
    done, failed = train_all(runs, signals)
    print(f"\n{name}: {STUDIES[name].where}. {STUDIES[name].note}\n")
    if name != "supervised":
        show(name, done, flags)
        return failed
    found = [(run, supervised(run, flags, signals)) for run in done]
    failed += [f"the supervised network of seed {run.seed} failed: its own words are above"
               for run, line in found if line is None]
    if found := [(run, line) for run, line in found if line]:
        show_masks(*map(list, zip(*found)), Path(flags.output_dir))
    return failed


def parse_flags(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line -> checked flags; more: train.py's, from behind --."""
    parser = CommandLine(__doc__)
    add = parser.add_argument
    add("study", choices=(*STUDIES, "all"), metavar="study", help=f"{', '.join(STUDIES)}, or all of them")
    add("--preset", default="", help="of train.py; default: demo without data, vits16 with data")
    add("--data_path", default="", help="a folder of pictures; without it the embedded ones")
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
    data = as_flags({"data_path": flags.data_path}) if flags.data_path else []
    flags.preset = flags.preset or parse_settings([*data, *flags.more]).preset
    return flags


def main(argv: list[str] | None = None) -> None:
    with errors_in_one_line():
        flags = parse_flags(argv)
        names = list(STUDIES) if flags.study == "all" else [flags.study]
        plan = {name: [make_run(STUDIES[name], row, seed, flags) for row in STUDIES[name].rows for seed in flags.seeds]
                for name in names}  # so that a wrong flag is told before the first hour
        with hardware.stop_signals() as signals:
            failed = [line for name, runs in plan.items() for line in conduct(name, runs, flags, signals)]
        if failed:
            print(*failed, sep="\n", file=sys.stderr)
            sys.exit(1)


if __name__ == "__main__":
    main()
