"""The ablations: runs are made and measured once, earlier seeds are kept, numbers stand beside the
paper's.
"""

import json
import math
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import numpy as np
import pytest
from PIL import Image

from ablations import __main__ as ablations
from ablations import report
from ablations import runs as ablation_runs
from ablations.rows import STUDIES, Row, Study
from ablations.runs import Run
from ablations.train import AblationSettings
from runtime.commandline import InputError
from runtime.creatures import make_creatures
from training.backbone import build_backbone
from training.checkpoint import save_checkpoint

K = 61
LINEAR = Row("one", {}, {"linear": 76.1})


def log_of(epochs: int, entropy: float = 2.0, kl: float = 0.5, **last: float) -> list[dict]:
    """A log.txt of so many epochs: the baselines, then k-NN 31, 32 ... of the teacher and one less
    of the student.
    """
    records = [
        {
            "epoch": epoch,
            "train_entropy": entropy,
            "train_kl": kl,
            "images_per_s": 100.0 + epoch,
            "knn_teacher": 31.0 + epoch,
            "knn_student": 30.0 + epoch,
        }
        for epoch in range(epochs)
    ]
    records[-1] |= last
    return [{"epoch": -1, "knn_untrained": 19.0, "knn_pixels": 50.0}, *records]


def a_run(
    folder: Path,
    log: list[dict] | None,
    command: str = "raise SystemExit(7)",
    name: str = "a row",
    seed: int = 0,
    epochs: int = 3,
    **settings,
) -> Run:
    """A run whose command is a line of Python, in a folder with this log.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    if log:
        (folder / "log.txt").write_text("".join(json.dumps(record) + "\n" for record in log))
    return Run(
        Row(name),
        seed,
        AblationSettings(epochs=epochs, out_dim=K, **settings),
        {"out_dim": K},
        folder,
        [sys.executable, "-c", command],
    )


def test_finished_runs_are_skipped_and_a_failing_one_is_told_and_left_out(tmp_path, capfd):
    """The commands: one that would fail if it were run, one that fails, one that finishes, an equal
    of the second.
    """
    text = "".join(json.dumps(record) + "\\n" for record in log_of(3))
    writes = (
        "from pathlib import Path; "
        f"Path({str(tmp_path / 'new' / 'log.txt')!r}).write_text('{text}')"
    )
    runs = [
        a_run(tmp_path / "old", log_of(3), name="finished"),
        a_run(tmp_path / "bad", None, name="failing"),
        a_run(tmp_path / "new", log_of(2), writes, "unfinished"),
        a_run(tmp_path / "bad", None, "print('again')", "its equal"),
    ]
    done, failed = ablation_runs.train_all(runs, [])
    assert [run.row.name for run in done] == ["finished", "unfinished"]
    assert failed == [
        "failing, seed 0 failed with exit status 7 and is left out: its own words are above"
    ]
    assert "again" not in capfd.readouterr().out, (
        "a run that failed is not tried again under another row's name"
    )


def test_a_run_whose_last_k_nn_is_missing_is_not_finished(tmp_path):
    """train.py writes the epoch before it evaluates; without labels nothing is to be waited for."""
    log = log_of(3)
    del log[-1]["knn_teacher"]
    assert not ablation_runs.finished(a_run(tmp_path, log))
    assert ablation_runs.finished(a_run(tmp_path, [{"epoch": -1}, *log[1:]]))
    assert not ablation_runs.finished(a_run(tmp_path, log_of(3), epochs=4))
    assert not ablation_runs.finished(a_run(tmp_path / "new", None))


def test_a_run_that_ends_unfinished_has_failed_and_so_has_one_that_fails_behind_its_last_epoch(
    tmp_path,
):
    """A full disk may keep a complete log from getting its checkpoint."""
    log = tmp_path / "late" / "log.txt"
    text = "".join(json.dumps(record) + "\\n" for record in log_of(3))
    late = a_run(
        tmp_path / "late",
        None,
        f"from pathlib import Path; Path({str(log)!r}).write_text('{text}'); exit(2)",
    )
    done, failed = ablation_runs.train_all([a_run(tmp_path / "short", None, "exit(0)"), late], [])
    assert not done and [line.split(" and is")[0][-1] for line in failed] == ["0", "2"], failed


@pytest.mark.skipif(sys.platform == "win32", reason="no such locks")
def test_two_runners_train_a_run_once(tmp_path):
    """The second waits for the first's lock, and then finds the run finished."""
    log = tmp_path / "run" / "log.txt"
    text = "".join(json.dumps(record) + "\\n" for record in log_of(3))
    command = (
        f"import time; from pathlib import Path; time.sleep(0.7); log = Path({str(log)!r}); "
        f"assert not log.exists(), 'trained twice'; log.write_text('{text}')"
    )
    with ThreadPoolExecutor() as runners:
        both = list(
            runners.map(
                lambda _: ablation_runs.train_all([a_run(log.parent, None, command)], []), range(2)
            )
        )
    assert [(len(done), failed) for done, failed in both] == [(1, []), (1, [])]


def test_seeds_of_an_earlier_call_are_kept_while_their_folder_is_the_same(tmp_path):
    """Also those of a row that failed now; but not lines of other settings, or of another number of
    processes.
    """
    lines = [
        {"row": row, "seed": seed, "folder": folder}
        for row, seed, folder in (
            ("a row", 0, "1process"),
            ("failed", 1, "other"),
            ("a row", 1, "1process"),
            ("a row", 2, "8processes"),
            ("gone", 3, "1process"),
        )
    ]
    (tmp_path / "study.json").write_text(
        json.dumps([*lines, {"seed": 4}])
    )  # as old versions wrote Fig. 4's
    planned = [
        a_run(tmp_path / "1process" / "seed1", None, seed=1),
        a_run(tmp_path / "other" / "seed1", None, name="failed", seed=1),
    ]
    assert ablations.earlier(tmp_path / "study.json", planned, lines[2:3]) == lines[:2]
    assert ablations.earlier(tmp_path / "none.json", planned, []) == []


def flags_of(folder: Path):
    """Those of a command whose --output_dir is this folder."""
    return ablations.parse_flags(["components", "--output_dir", str(folder)])


@pytest.mark.skipif(sys.platform == "win32", reason="no such locks")
def test_two_runners_keep_each_other_s_lines(tmp_path, monkeypatch):
    """The other one holds the lock, and writes its line before it lets go."""
    monkeypatch.setitem(STUDIES, "tiny", Study("nowhere", {}, (Row("a row"),)))
    held, runs = (
        Event(),
        [a_run(tmp_path / "key" / f"seed{seed}", log_of(3), seed=seed) for seed in (0, 1)],
    )

    def write_the_other_one() -> None:
        with ablation_runs.alone(tmp_path, []):
            held.set()
            time.sleep(0.5)
            (tmp_path / "tiny.json").write_text(json.dumps([ablations.raw_line(runs[1], "lab")]))

    with ThreadPoolExecutor() as other:
        writing = other.submit(write_the_other_one)
        held.wait()
        assert ablations.show("tiny", runs[:1], runs[:1], flags_of(tmp_path), []) == []
        writing.result()
    assert [line["seed"] for line in json.loads((tmp_path / "tiny.json").read_text())] == [0, 1]


def test_chosen_rows_are_trained_and_the_lines_of_the_others_stay(tmp_path, monkeypatch):
    rows = (Row("first"), Row("second"), Row("third"))
    monkeypatch.setitem(STUDIES, "tiny", Study("nowhere", {}, rows))
    planned = []
    for row in rows:
        run = a_run(tmp_path / row.name / "seed0", log_of(3))
        planned.append(run._replace(row=row))
    flags = flags_of(tmp_path)
    for flags.rows, names in [([2], ["second"]), ([3, 1], ["first", "third", "second"])]:
        assert ablations.conduct("tiny", planned, flags, []) == []
        lines = json.loads((tmp_path / "tiny.json").read_text())
        assert [line["row"] for line in lines] == names


@pytest.mark.skipif(sys.platform == "win32", reason="no such locks")
def test_an_evaluation_waits_for_another_runner_s_and_takes_its_result(tmp_path):
    held, run = Event(), a_run(tmp_path, log_of(3))

    def evaluate() -> None:
        with ablation_runs.alone(tmp_path, []):
            held.set()
            time.sleep(0.5)
            (tmp_path / "eval_linear.jsonl").write_text('{"measured": {"top-1 %": 47.0}}\n')

    with ThreadPoolExecutor() as other:
        evaluating = other.submit(evaluate)
        held.wait()
        assert ablations.linear(run._replace(row=LINEAR), flags_of(tmp_path), []) == {
            "linear": 47.0
        }
        evaluating.result()


def test_an_evaluation_that_fails_is_told_and_an_empty_result_is_none(tmp_path, monkeypatch, capfd):
    """A full disk leaves an empty file; here there are no weights, so the evaluation fails, and the
    row stands.
    """
    monkeypatch.setitem(STUDIES, "tiny", Study("nowhere", {}, (LINEAR,)))
    run = a_run(tmp_path / "key" / "seed0", log_of(3))._replace(row=LINEAR)
    (run.folder / "eval_linear.jsonl").touch()
    failed = ablations.show("tiny", [run], [run], flags_of(tmp_path), [])
    assert failed == ["the linear evaluation of one, seed 0 failed: its own words are above"]
    assert "no checkpoint at" in capfd.readouterr().err
    assert [line["row"] for line in json.loads((tmp_path / "tiny.json").read_text())] == ["one"]


def test_a_damaged_file_is_named_and_not_its_folder(tmp_path):
    """Which holds the trained run."""
    for text in ('{"epoch": -1}\n{"epo', "[1]\n", "null\n"):
        (tmp_path / "log.txt").write_text(text)
        with pytest.raises(
            InputError, match=r"log.txt' is damaged: remove it, and the same command makes it again"
        ):
            ablation_runs.read_lines(tmp_path / "log.txt")
        (tmp_path / "tiny.json").write_text(text)
        with pytest.raises(InputError, match=r"tiny.json' is damaged: remove it; the runs stay"):
            ablations.earlier(tmp_path / "tiny.json", [], [])


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("patch_size", {"features_per_s"}),
        ("heads", {"features_per_s"}),
        ("crops", {"train_per_s", "mib"}),
        ("components", set()),
    ],
)
def test_a_study_s_costs_are_those_that_the_paper_has(name, wanted, tmp_path):
    """Fig. 5 and appendix D have images/s of features, Table 8 hours and GiB; what was measured
    needs no device.
    """
    kept = {"ms": 125.0, "train_per_s": 256.0, "mib": None, "features_per_s": 2000.0}
    (tmp_path / "costs.json").write_text(json.dumps(kept) + "\n")
    run = a_run(tmp_path, log_of(3), device="none there")
    costs = ablations.costs(run._replace(row=STUDIES[name].rows[0]), [])
    assert costs == {cost: kept[cost] for cost in wanted}


@pytest.mark.slow
def test_costs_are_measured_once_and_training_s_speed_is_that_of_a_step(tmp_path):
    run = a_run(
        tmp_path,
        None,
        warmup_epochs=0,
        arch="vit_nano",
        patch_size=16,
        global_crops_size=32,
        local_crops_size=16,
        batch_size_per_gpu=3,
    )._replace(row=STUDIES["crops"].rows[0])
    (tmp_path / "costs.json").write_text('{"of": "another version"}\n')
    costs = ablations.costs(run, [])
    kept = json.loads((tmp_path / "costs.json").read_text())
    assert costs["train_per_s"] == pytest.approx(1000 * 3 / kept["ms"]), (
        "images a step / seconds a step"
    )
    assert ablations.costs(run, []) == costs, "a second measurement would differ"


@pytest.mark.slow
def test_a_row_whose_costs_need_more_memory_has_none(tmp_path, capfd):
    """The bench says why, and the table stands."""
    small = {"arch": "vit_nano", "global_crops_size": 32, "local_crops_size": 16}
    run = a_run(tmp_path, None, warmup_epochs=0, batch_size_per_gpu=10**10, **small)
    assert ablations.costs(run._replace(row=STUDIES["crops"].rows[0]), []) == {}
    said = capfd.readouterr().err.strip()
    assert said.startswith("error: the memory does not suffice") and "\n" not in said
    assert "lower --batch_size_per_gpu" in said
    assert not (tmp_path / "costs.json").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="no such signal")
def test_a_bench_that_was_killed_is_taken_for_full_memory(tmp_path, monkeypatch):
    """Linux kills the process that takes too much."""
    kill = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    monkeypatch.setattr(ablations, "cost_command", lambda run: [sys.executable, "-c", kill])
    run = a_run(tmp_path, None)
    assert ablations.costs(run._replace(row=STUDIES["crops"].rows[0]), []) == {}


@pytest.mark.slow
def test_costs_that_fail_for_another_reason_stop_the_study(tmp_path, capfd):
    """Else the table would lack a column, and exit status 0 would say that all is well."""
    run = a_run(tmp_path, None, warmup_epochs=0, patch_size=17)
    with pytest.raises(InputError, match=r"costs failed with exit status 2: .* above"):
        ablations.costs(run._replace(row=STUDIES["crops"].rows[0]), [])
    assert "is no multiple of --patch_size 17" in capfd.readouterr().err


def test_sigterm_is_passed_on_and_the_line_says_that_the_same_command_goes_on(capsys):
    began = time.monotonic()
    with pytest.raises(SystemExit) as stopped:
        ablation_runs.execute(
            [sys.executable, "-c", "import time; time.sleep(60)"], [signal.SIGTERM]
        )
    assert stopped.value.code == 128 + signal.SIGTERM
    assert time.monotonic() - began < 20, "the child was not ended, but waited for"
    assert "the same command continues there" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["crops", "heads", "center"])
def test_a_signal_stops_between_rows_and_studies_too(tmp_path, name):
    """Before anything is measured or written."""
    run = a_run(tmp_path / "key" / "seed0", log_of(3))._replace(row=STUDIES[name].rows[0])
    with pytest.raises(SystemExit) as stopped:
        ablations.conduct(name, [run], flags_of(tmp_path), [signal.SIGTERM])
    assert stopped.value.code == 128 + signal.SIGTERM
    assert not [*tmp_path.glob("*.json"), *run.folder.glob("*.json*")]


def test_a_dataset_is_fetched_before_the_first_run_where_that_is_asked_for(
    tmp_path, monkeypatch, capsys
):
    """From a place that is not there, so that it fails; without --download nobody would have looked
    there.
    """
    monkeypatch.setattr("torchvision.datasets.CIFAR10.url", (tmp_path / "nowhere").as_uri())
    with pytest.raises(SystemExit):
        ablations.main(
            [
                "collapse",
                "--data_path",
                str(tmp_path),
                "--output_dir",
                str(tmp_path / "out"),
                "--",
                "--dataset",
                "cifar10",
                "--download",
            ]
        )
    assert "urlopen error" in capsys.readouterr().err, "pass --download on to open_images"


@pytest.mark.parametrize(
    ("entropy", "kl", "found"),
    [
        (2.0, 0.5, ""),
        (0.999 * math.log(K), 0.001, "COLLAPSE, uniform"),
        (0.001, 0.001, "COLLAPSE, one-hot"),
    ],
)
def test_each_run_s_verdict_is_checked_against_the_row_s(tmp_path, entropy, kl, found):
    """Fig. 7: only the collapse that a row expects passes in silence; one that expects nothing
    always does.
    """
    rows = tuple(
        Row(str(verdict), verdict=verdict)
        for verdict in ("", "COLLAPSE, uniform", "COLLAPSE, one-hot", None)
    )
    run = a_run(tmp_path, log_of(3, entropy, kl))
    lines = [ablations.raw_line(run._replace(row=row), "lab") for row in rows]
    assert {line["verdict"] for line in lines} == {found}
    told = report.surprises(Study("Fig. 7", {}, rows), lines)
    assert len(told) == 2 and all(f"found {found or 'no collapse'}" in line for line in told)


def test_other_losses_have_no_verdict(tmp_path):
    """MSE and InfoNCE have no teacher's entropy to judge by, and their log says none."""
    log = [
        {key: value for key, value in record.items() if key not in ("train_entropy", "train_kl")}
        for record in log_of(3)
    ]
    line = ablations.raw_line(a_run(tmp_path, log), "lab")
    assert line["verdict"] == "" and line["train_kl"] == [None] * 3


def test_a_raw_line_keeps_every_epoch(tmp_path):
    run = a_run(tmp_path, log_of(3, knn_teacher=36.0), seed=1)
    line = json.loads(
        json.dumps(
            ablations.raw_line(run._replace(row=Row("other", {}, {}, {"out_dim": 17})), "lab")
        )
    )
    assert (line["row"], line["seed"], line["changes"], line["out_dim"]) == (
        "other",
        1,
        {"out_dim": 17},
        K,
    )
    assert line["knn_teacher"] == [31.0, 32.0, 36.0] and line["knn_student"] == [30.0, 31.0, 32.0]
    assert line["train_entropy"] == [2.0] * 3 and line["images_per_s"] == [100.0, 101.0, 102.0]


def weights_of(path: Path) -> Path:
    """A checkpoint of a fresh ViT there."""
    network = build_backbone("vit_nano", 8, 48, init_std=0.2)
    save_checkpoint(
        path,
        {
            "teacher": {f"backbone.{key}": value for key, value in network.state_dict().items()},
            "args": {
                "arch": "vit_nano",
                "eval_size": 64,
                "eval_crop": 1.0,
                "mean": (0.4,) * 3,
                "std": (0.2,) * 3,
            },
        },
    )
    return path


def test_fig_4_s_table_is_of_the_seeds_of_all_calls(tmp_path):
    """The evaluations' results lie in the runs' folders, as a first call leaves them."""
    for i in range(2):
        Image.fromarray(make_creatures(2).images[i].permute(1, 2, 0).numpy()).save(
            tmp_path / f"{i}.png"
        )
    for seed in (0, 1):
        run = a_run(
            tmp_path / "key" / f"seed{seed}",
            log_of(3),
            name="DINO",
            seed=seed,
            data_path=str(tmp_path),
        )
        (run.folder / "eval_transfer.jsonl").write_text(
            json.dumps(
                {
                    "table": "Transfer",
                    "arch": "vit_nano",
                    "patch_size": 8,
                    "data": "two images",
                    "measured": {"from scratch, top-1 %": 47.0 + 3 * seed},
                }
            )
            + "\n"
        )
        for folder in (run.folder, run.folder / "supervised"):
            folder.mkdir(exist_ok=True)
            weights_of(folder / "checkpoint.pth")
        assert ablations.show_masks([run], [run], flags_of(tmp_path), []) == []
    lines = json.loads((tmp_path / "supervised.json").read_text())
    assert sorted((line["row"], line["seed"], line["folder"]) for line in lines) == [
        ("DINO", 0, "key"),
        ("DINO", 1, "key"),
    ]
    assert "48.5 ± 2.1 (2)" in (tmp_path / "supervised.md").read_text()


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("epoch", "invalid choice: 'epoch'"),
        ("center --nproc_per_node 0", "--nproc_per_node 0 must be at least 1"),
        ("center --nproc_per_node 1025", "--nproc_per_node 1025 must be at least 1 and at most"),
        ("center --seeds 1 0 1", "--seeds 1 0 1 has one twice"),
        ("center --data_path nowhere", "nowhere"),
        ("center -- --seed 3", "--seed stands behind --"),
        ("center --preset demo", "--preset demo is not for studies: take lab"),
        ("center --preset vitg14", "--preset vitg14 is unknown"),
        ("center -- --lr -1", "--lr -1.0 must be at least 0"),
        (
            "center -- --loss mse --centering sinkhorn",
            "--centering sinkhorn is for --loss cross_entropy",
        ),
        (
            "center -- --head_nlayers 0",
            "--head_nlayers 0 must be at least 1 (0 without the l2 bottleneck)",
        ),
        ("center -- --cuda_graph true", "--cuda_graph True is for train.py: leave it out"),
        ("center -- --nonsense 1", "unrecognized arguments: --nonsense"),
        ("center --rows 1 5", "--rows 5 is not there: choose of 1: m = 0, 2: m = 0.9, 3: m"),
        ("center --rows 2 2", "--rows 2 2 has one twice"),
        ("all --rows 1", "--rows are of one study: name it"),
    ],
)
def test_a_wrong_flag_is_told_before_anything_runs(argv, said, capsys, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        ablations.main(["--output_dir", str(tmp_path), *argv.split()])
    error = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and said in error and len(error.splitlines()) == 1, error
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_a_study_of_two_rows_runs_fails_in_one_and_shows_the_other(tmp_path, monkeypatch, capfd):
    """train.py and evals.linear themselves, very small; another evals, in the current folder, is
    not taken for ours.
    """
    rng = np.random.default_rng(0)
    for i in range(24):
        path = tmp_path / "photos" / f"class{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(path)
    (tmp_path / "evals").mkdir()
    (tmp_path / "evals" / "__init__.py").write_text("raise SystemExit('another evals')")
    monkeypatch.chdir(tmp_path)
    rows = (Row("small", {}, {"linear": 76.1}), Row("too large", {"batch_size_per_gpu": 5000}))
    monkeypatch.setitem(STUDIES, "tiny", Study("nowhere", {}, rows))
    argv = [
        "tiny",
        "--preset",
        "lab",
        "--data_path",
        str(tmp_path / "photos"),
        "--epochs",
        "1",
        "--output_dir",
        str(tmp_path / "out"),
        "--",
        *"--patch_size 16 --global_crops_size 32 --local_crops_size 16 --eval_size 32 "
        "--out_dim 31 --head_hidden_dim 29 --head_bottleneck_dim 7 --batch_size_per_gpu 4 "
        "--device cpu --precision fp32 --num_workers 0".split(),
    ]
    with pytest.raises(SystemExit) as stopped:
        ablations.main(argv)
    said = capfd.readouterr()
    assert stopped.value.code == 1 and "too large, seed 0 failed with exit status 2" in said.err
    assert "| small" in said.out and "lower --batch_size_per_gpu" in said.err
    (line,) = json.loads((tmp_path / "out" / "tiny.json").read_text())
    assert (
        line["row"] == "small"
        and line["linear"] > 0
        and len(line["knn_teacher"]) == 1
        and line["data"] == "photos"
    )
    assert (tmp_path / "out" / "tiny.png").exists()
