"""Bad input: one clear line that names the flag or the file, exit status 2, no traceback, nothing
saved is lost.
"""

import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import eval_knn
import train
import visualize_attention
from ablations.__main__ import main as ablations_main
from evals import (
    attention_segmentation,
    copy_detection,
    image_retrieval,
    linear,
    transfer,
    video_segmentation,
)
from runtime.commandline import InputError, errors_in_one_line
from runtime.hardware import losses_in_one_line
from settings import Settings, check, parse_settings
from training import evaluation

REPO = Path(__file__).parent.parent


def write_photos(folder: Path) -> Path:
    folder.mkdir()
    for i in range(3):
        Image.new("RGB", (40, 30), (80 * i, 50, 90)).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def photos(tmp_path) -> Path:
    return write_photos(tmp_path / "photos")


def error_of(main, capsys, *flags: str) -> str:
    """The last line that main prints before it exits with status 2."""
    with pytest.raises(SystemExit) as stopped:
        main([str(flag) for flag in flags])
    captured = capsys.readouterr()
    assert stopped.value.code == 2, captured.err
    assert "Traceback" not in captured.err and "Traceback" not in captured.out
    lines = [
        line for line in captured.err.strip().splitlines() if "img/s" not in line
    ]  # beside the progress bar
    assert len(lines) == 1, f"one line was wanted: {lines}"
    return lines[0]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--data_path nowhere", "'nowhere' is not there"),
        (
            "--momentum_teacher 0.999 --momentum_teacher_end 0.99",
            "--momentum_teacher_end 0.99 is below --momentum_teacher 0.999",
        ),
        ("--preset vitg14", "--preset vitg14 is unknown: choose one of demo"),
        ("--arch vit_giant", "--arch vit_giant is unknown: choose one of vit_nano"),
        ("--learning_rate 1", "unrecognized arguments: --learning_rate"),
        ("--ep 3", "unrecognized arguments: --ep"),
        (
            "--warmup_epoch 3 --lrr=1",
            "--warmup_epoch 3 --lrr=1; did you mean --warmup_epochs?; did you mean --lr?",
        ),
        ("--data_pth=/very/long/path", "--data_pth=/very/long/path; did you mean --data_path? ("),
        ("--learning-rate 3", "--learning-rate 3; did you mean --lr? ("),
        ("\N{EM DASH}epochs 3", "did you mean --epochs? ("),
        ("-epochs 3", "did you mean --epochs? ("),
        ("--no-use_bn_in_head", "did you mean --use_bn_in_head false? ("),
        ("--data photos", "did you mean --data_path? ("),
        ("--data-dir photos", "did you mean --data_path? ("),
        ("--resume run/checkpoint.pth", "did you mean --output_dir? ("),
        ("--data_path my photos", "; photos follows no flag: one value with spaces wants quotes ("),
        ("--global_crops_scale 0.4,1.0", "arguments; numbers stand apart, as in 0.4 1.0"),
        ("--batch 3", "--batch 3; did you mean --batch_size_per_gpu? ("),
        ("--batch-size-per-gpu 3", "did you mean --batch_size_per_gpu? ("),
        ("--zzz 3 arch", "unrecognized arguments: --zzz 3 arch ("),
        ("--data_path=", "--data_path has an empty value: is a variable of the shell not set? ("),
        ("--epochs three", "--epochs: invalid int value: 'three'"),
        (f"--epochs {400 * '7'}", f"argument --epochs: {100 * '7'} is too large"),
        (f"--epochs {2**63}", f"argument --epochs: {2**63} is too large"),
        (f"--out_dim -{2**63}", f"argument --out_dim: -{2**63} is too large"),
        (f"--epochs {5003 * '7'}", f"--epochs: invalid int value: '{199 * '7'} ... (--help"),
        (f"--lr {400 * '7'}", "--lr inf must be finite"),
        ("--epochs 0", "--epochs 0 must be at least 1"),
        (
            "--epochs 3 --warmup_epochs 4",
            "--epochs 3 is shorter than --warmup_epochs 4: pass --warmup_epochs 0, or more",
        ),
        (
            "--epochs 30 --warmup_epochs 1 --warmup_teacher_temp_epochs 31",
            "--epochs 30 is shorter than --warmup_teacher_temp_epochs 31: pass --warmup_teacher",
        ),
        (
            "--preset vits16 --epochs 1",
            "--epochs 1 is shorter than --warmup_epochs 10 and --warmup_teacher_temp_epochs 30: "
            "pass --warmup_epochs 0 --warmup_teacher_temp_epochs 0, or more --epochs",
        ),
        (
            "--global_crops_size 50",
            "--global_crops_size 50 is no multiple of --patch_size 8: take 48",
        ),
        ("--local_crops_size 20", "--local_crops_size 20 is no multiple"),
        (f"--eval_size {10**12}", f"--eval_size {10**12} must be at most 4096"),
        ("--out_dim 1", "--out_dim 1 must be at least 2"),
        (f"--out_dim {10**18}", "the memory does not suffice ("),
        (f"--local_crops_number {10**9}", f"--local_crops_number {10**9} must be at most 1000"),
        (f"--head_nlayers {10**9}", f"--head_nlayers {10**9} must be at most 100"),
        ("--teacher_temp 0", "--teacher_temp 0.0 must be above 0"),
        ("--student_temp -1", "--student_temp -1.0 must be above 0"),
        ("--loss mse", "unrecognized arguments: --loss mse"),
        ("--arch resnet18 --num_heads 5", "--num_heads 5 is for ViTs"),
        ("--teacher_temp nan", "--teacher_temp nan must be finite"),
        ("--momentum_teacher 1.5", "--momentum_teacher 1.5 must be at most 1"),
        ("--center_momentum -0.1", "--center_momentum -0.1 must be at least 0"),
        ("--local_crops_scale 0.4 0.1", "--local_crops_scale 0.4 0.1 must be two fractions"),
        ("--global_crops_scale 0.4 1.1", "--global_crops_scale 0.4 1.1 must be at most 1"),
        ("--drop_path_rate 1", "--drop_path_rate 1.0 must be below 1"),
        ("--optimizer adam", "--optimizer adam is unknown"),
        ("--norm_last_layer maybe", "'maybe' is neither true nor false"),
        ("--dataset imagenet22k", "--dataset imagenet22k is unknown"),
        ("--dataset cifar10 --data_path .", "--dataset cifar10 is not under"),
        (
            "--preset vits16 --init_from nowhere.pth --data_path {photos} --batch_size_per_gpu 3",
            "no checkpoint at 'nowhere.pth'",
        ),
        (
            "--preset vits16 --data_path {photos} --batch_size_per_gpu 5",
            "fewer than one step of 5: lower --batch_size_per_gpu",
        ),
    ],
)
def test_a_bad_flag_is_named_with_its_fix(flags, said, photos, capsys, tmp_path):
    given = flags.format(photos=photos).split()
    assert said in error_of(
        train.main, capsys, *given, "--device", "cpu", "--output_dir", tmp_path / "out"
    )


@pytest.mark.parametrize(
    ("main", "flags", "said"),
    [
        (attention_segmentation.main, "--seed -1", "--seed -1 must be at least 0"),
        (linear.main, "--seed -1", "--seed -1 must be at least 0"),
        (transfer.main, "--seed -1", "--seed -1 must be at least 0"),
        (transfer.main, f"--train_size {10**12}", f"--train_size {10**12} must be at least 0 and"),
        (eval_knn.main, f"--batch_size {10**12}", f"--batch_size {10**12} must be at least 1"),
        (eval_knn.main, f"--eval_size {10**12}", f"--eval_size {10**12} must be at least 1"),
        (video_segmentation.main, "--eval_size -1", "--eval_size -1 must be at least 1"),
        (ablations_main, "components --seeds 0 -1", "--seeds -1 must be at least 0"),
    ],
)
def test_a_number_without_sense_is_refused_by_every_script(main, flags, said, capsys):
    given = flags.split()
    if main is not ablations_main:
        given += ["--pretrained_weights", "nowhere.pth", "--device", "cpu"]
    assert said in error_of(main, capsys, *given)


def test_a_flag_cut_short_is_answered_with_the_shortest_that_begins_so(capsys):
    line = error_of(eval_knn.main, capsys, "--batch", 3)
    assert "--batch 3; did you mean --batch_size? (" in line


@pytest.mark.parametrize("main", [train.main, eval_knn.main, visualize_attention.main])
def test_an_empty_value_is_no_demo(main, capsys):
    """--data_path "$PHOTOS" without such a variable would mean the embedded images."""
    said = error_of(main, capsys, "--output_dir", "a", "--pretrained_weights", "")
    assert "--pretrained_weights has an empty value: is a variable of the shell not set?" in said


@pytest.mark.parametrize("written", [["--data_path=~/a b/=c"], ["--data_path", "~/a b/=c"]])
def test_the_home_folder_is_found_where_the_shell_leaves_its_sign(written, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    flags = parse_settings(["--output_dir", "~", *written])
    assert flags.output_dir == str(tmp_path) and flags.data_path == f"{tmp_path}/a b/=c"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_asking_for_cuda_where_there_is_none(capsys, tmp_path):
    flags = ["--device", "cuda", "--output_dir", tmp_path / "run"]
    assert "--device cuda is not available here" in error_of(train.main, capsys, *flags)


def test_more_workers_than_any_machine_has_are_refused_before_a_process_starts():
    workers = 10**9
    with pytest.raises(InputError, match=f"--num_workers {workers} must be at most 1024"):
        check(Settings(num_workers=workers))
    flags = evaluation.command_line("").parse_args(["--device", "cpu", "--num_workers", "1025"])
    with pytest.raises(SystemExit), evaluation.start(flags):
        pytest.fail("the evaluation began")


@pytest.mark.parametrize(
    "full",
    [
        MemoryError(),
        MemoryError("Unable to allocate 3.00 TiB for an array"),
        RuntimeError("[enforce fail] not enough memory: you tried to allocate 7 bytes."),
        RuntimeError("CUDA out of memory. Tried to allocate 7 GiB."),
    ],
)
def test_full_memory_is_one_line_and_status_2(full, capsys):
    with pytest.raises(SystemExit) as stopped, errors_in_one_line():
        raise full
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: the memory does not suffice (")


@pytest.mark.parametrize(
    "other", [RuntimeError("CUDA error: an illegal memory access"), KeyError("x")]
)
def test_an_error_about_something_else_keeps_its_traceback(other):
    with pytest.raises(type(other)) as raised, errors_in_one_line():
        raise other
    assert raised.value is other


def test_ctrl_c_is_one_line_and_status_130(capsys):
    with pytest.raises(SystemExit) as stopped, errors_in_one_line():
        raise KeyboardInterrupt
    assert stopped.value.code == 130 and capsys.readouterr().err == "stopped\n"


def test_a_lost_worker_is_named_on_a_line_of_its_own_behind_an_unfinished_bar(capsys):
    """Its signal may come while the bar is drawn, before the bar's own end of line."""
    with pytest.raises(SystemExit) as stopped, errors_in_one_line(), losses_in_one_line(False):
        print("50%|#####     | 4/8 img/s", end="", file=sys.stderr)
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")
    last = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2 and last.startswith("error: a process of the loader"), last


def test_a_folder_without_images(capsys, tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    flags = ["--data_path", tmp_path, "--output_dir", tmp_path / "run"]
    assert "no images in" in error_of(train.main, capsys, *flags)


TINY = (
    "--preset vits16 --arch vit_nano --patch_size 16 --global_crops_size 32 --local_crops_size 16 "
    "--local_crops_number 1 --eval_size 32 --out_dim 13 --head_hidden_dim 11 "
    "--head_bottleneck_dim 5 --batch_size_per_gpu 2 "
    "--epochs 1 --warmup_epochs 0 --warmup_teacher_temp_epochs 0 --device cpu"
).split()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_image_that_cannot_be_read_is_named(photos, capsys, tmp_path, workers):
    (photos / "torn one.jpg").write_bytes(b"\xff\xd8\xff\xe0 torn")
    flags = [
        *TINY,
        "--data_path",
        photos,
        "--output_dir",
        tmp_path / "out",
        "--batch_size_per_gpu",
        "4",
    ]
    assert "torn one.jpg" in error_of(train.main, capsys, *flags, "--num_workers", workers)


def test_images_that_cannot_be_read_are_skipped_with_a_count(photos, capsys, tmp_path):
    (photos / "torn one.jpg").write_bytes(b"\xff\xd8\xff\xe0 torn")
    train.main(
        [
            *TINY,
            "--data_path",
            str(photos),
            "--output_dir",
            str(tmp_path / "out"),
            "--num_workers",
            "0",
            "--skip_bad_images",
            "true",
            "--epochs",
            "1",
            "--knn_every",
            "0",
        ]
    )
    said = capsys.readouterr().out
    assert "torn one.jpg" in said and "skipped 1 images" in said
    assert (tmp_path / "out" / "checkpoint.pth").exists()


def test_an_output_folder_that_is_a_file_is_refused_before_anything_is_read(capsys, tmp_path):
    (tmp_path / "run").write_text("mine")
    flags = f"--device cpu --data_path nowhere --output_dir {tmp_path / 'run'}".split()
    assert "run' is a file: choose a folder" in error_of(train.main, capsys, *flags)
    assert (tmp_path / "run").read_text() == "mine"


def test_an_output_folder_that_cannot_be_written(photos, capsys, tmp_path):
    (tmp_path / "file").write_text("a file where a folder is wanted")
    flags = [*TINY, "--data_path", photos, "--num_workers", "0"]
    assert "cannot write" in error_of(
        train.main, capsys, *flags, "--output_dir", tmp_path / "file" / "run"
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run's folder, for all tests that need one."""
    folder = tmp_path_factory.mktemp("trained")
    train.main(
        [
            *TINY,
            "--data_path",
            str(write_photos(folder / "photos")),
            "--output_dir",
            str(folder / "run"),
            "--num_workers",
            "0",
        ]
    )
    return folder / "run"


@pytest.fixture
def finished(trained, tmp_path) -> Path:
    """A copy of it, to do harm to."""
    return shutil.copytree(trained, tmp_path / "run")


@pytest.mark.parametrize(
    ("flag", "value"), [("--arch", "vit_tiny"), ("--patch_size", "8"), ("--out_dim", "17")]
)
def test_a_run_of_another_network_is_not_continued(finished, photos, capsys, flag, value):
    before = (finished / "checkpoint.pth").read_bytes()
    said = error_of(
        train.main, capsys, *TINY, "--data_path", photos, "--output_dir", finished, flag, value
    )
    assert f"was made with {flag}" in said and "--output_dir" in said
    assert (finished / "checkpoint.pth").read_bytes() == before


def test_a_torn_checkpoint_is_not_overwritten(finished, photos, capsys):
    torn = (finished / "checkpoint.pth").read_bytes()[:1000]
    (finished / "checkpoint.pth").write_bytes(torn)
    said = error_of(train.main, capsys, *TINY, "--data_path", photos, "--output_dir", finished)
    assert "truncated" in said and (finished / "checkpoint.pth").read_bytes() == torn


@pytest.mark.parametrize(
    "main",
    [
        attention_segmentation.main,
        copy_detection.main,
        image_retrieval.main,
        eval_knn.main,
        linear.main,
        transfer.main,
        video_segmentation.main,
        visualize_attention.main,
    ],
)
def test_evaluations_refuse_what_is_no_checkpoint(main, tmp_path, photos, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    more = ["--image_path", photos / "0.png"] if main is visualize_attention.main else []
    assert "--pretrained_weights" in error_of(main, capsys, *more)
    assert "no checkpoint at" in error_of(
        main, capsys, "--pretrained_weights", "nowhere.pth", *more
    )
    (tmp_path / "code.pth").write_bytes(pickle.dumps(print))
    assert "never run" in error_of(
        main, capsys, "--pretrained_weights", tmp_path / "code.pth", *more
    )
    assert "choose one of dino_vits16" in error_of(
        main, capsys, "--pretrained", "dino_vitg14", *more
    )


def test_knn_without_labels_says_what_is_missing(finished, photos, capsys):
    said = error_of(
        eval_knn.main,
        capsys,
        "--pretrained_weights",
        finished / "checkpoint.pth",
        "--data_path",
        photos,
    )
    assert "no labels" in said


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--image_path nowhere.png", "'nowhere.png'"),
        ("--image_path {photos}/0.png --threshold 1.5", "--threshold 1.5"),
        ("--image_path {photos}/0.png --image_size 0", "--image_size 0"),
        ("--image_path {photos}/torn.jpg", "torn.jpg"),
    ],
)
def test_the_attention_figure_refuses_bad_input(finished, photos, capsys, flags, said):
    (photos / "torn.jpg").write_bytes(b"torn")
    weights = ["--pretrained_weights", finished / "checkpoint.pth"]
    assert said in error_of(
        visualize_attention.main, capsys, *weights, *flags.format(photos=photos).split()
    )


COMMANDS = {
    "refused": (["train.py", "--epochs", "0"], ["eval_knn.py"]),
    "help": (["train.py", "--help"], ["visualize_attention.py", "--help"]),
}


@pytest.fixture(scope="module")
def answers() -> dict[str, list[tuple[str, str, int]]]:
    """Each command's output, errors and status; all at once, since some load torch."""
    started = {
        name: [
            subprocess.Popen(
                [sys.executable, *command],
                cwd=REPO,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for command in commands
        ]
        for name, commands in COMMANDS.items()
    }
    return {
        name: [(*process.communicate(timeout=120), process.returncode) for process in processes]
        for name, processes in started.items()
    }


@pytest.mark.slow
def test_the_exit_status_of_the_command_itself(answers):
    for _, errors, status in answers["refused"]:
        assert status == 2 and len(errors.strip().splitlines()) == 1, errors


def test_a_reader_that_has_ended_is_one_line(tmp_path):
    program = (
        "import sys; from runtime.commandline import errors_in_one_line\n"
        "with errors_in_one_line():\n    while True:\n        print('a line', flush=True)"
    )
    command = f'"{sys.executable}" -c "$PROGRAM" | head -1'
    given = {"PROGRAM": program, "PATH": "/usr/bin:/bin"}
    ended = subprocess.run(
        command, shell=True, env=given, cwd=REPO, capture_output=True, text=True, timeout=60
    )
    assert ended.stdout == "a line\n"
    assert ended.stderr == "error: what read the output has ended, as | head does\n"


@pytest.mark.slow
def test_help_needs_nothing(answers):
    for said, _, status in answers["help"]:
        assert status == 0 and "--" in said
