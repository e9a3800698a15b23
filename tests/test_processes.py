"""Two processes compute together what one computes alone, also where there is nothing to do for one
of the two.
"""

import importlib
import json
import os
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import test_runs
import test_transfer
import torch
from test_attention_segmentation import write_voc
from test_copy_detection import save_creatures, write_copydays
from test_linear import assert_same, write_creatures
from test_video import write_davis

from training.backbone import build_backbone

REPO = Path(__file__).parent.parent
FROZEN = (
    " --pretrained_weights {data}/weights.pth --eval_size 32 --device cpu "
    "--results {output}/results.jsonl"
)
PICTURES = FROZEN + " --num_workers 0"
TRAINING = (
    f"train {' '.join(test_runs.TINY)} --drop_path_rate 0"  # each process draws masks of its own
    + " --batch_size_per_gpu {batch} --data_path {data}/bright --output_dir {output}"
)
LEARNING = {
    "training": TRAINING,
    "training with batch normalisation": TRAINING + " --use_bn_in_head true",
    "training with Sinkhorn-Knopp": "ablations." + TRAINING + " --centering sinkhorn",
    # the queue holds whole steps: their order inside differs
    "training by InfoNCE": "ablations." + TRAINING + " --loss infonce --queue_length 48",
    "linear": "evals.linear --data_path {data}/creatures --output_dir {output} --epochs 3 "
    "--lr 0.03 0.3 --batch_size {batch}" + PICTURES,
    "fine-tuning": f"evals.transfer {' '.join(test_transfer.TINY)} --from_scratch --lr 0.2 "
    "--mixup 0 --cutmix 0 --drop_path_rate 0 --batch_size {batch} --data_path {data}/dark "
    "--output_dir {output} --results {output}/results.jsonl",
}
EVALUATIONS = {
    "k-NN": "eval_knn --data_path {data}/photos --nb_knn 3 5" + PICTURES,
    "k-NN, one test image": "eval_knn --data_path {data}/photos/few --nb_knn 1 5" + PICTURES,
    "retrieval": "evals.image_retrieval --data_path {data}/photos" + PICTURES,
    "copies, one distractor": "evals.copy_detection --data_path {data}/copies "
    "--distractors {data}/one --whiten {data}/photos" + PICTURES,
    "attention": "evals.attention_segmentation --data_path {data}/voc" + PICTURES,
    "attention, the first without objects": "evals.attention_segmentation "
    "--data_path {data}/voc_of_two" + PICTURES,
    "attention, one image": "evals.attention_segmentation --data_path {data}/voc_of_one" + PICTURES,
    "videos": "evals.video_segmentation --data_path {data}/davis --overlay false "
    "--output_dir {output}" + FROZEN,
    "one video": "evals.video_segmentation --data_path {data}/davis_of_one --overlay false "
    "--output_dir {output}" + FROZEN,
}
DRIVER = """
import importlib, json, os, pathlib, sys, warnings
os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
files = [file for pattern in ("*.py", "*/*.py") for file in pathlib.Path().glob(pattern)]
ours = "|".join(r"\\.".join(file.with_suffix("").parts) for file in files)
for deprecated in (DeprecationWarning, FutureWarning):  # in our own modules
    warnings.filterwarnings("error", category=deprecated, module=f"({ours})$")
for port, script, *flags in json.load(open(sys.argv[1])):
    os.environ["MASTER_PORT"] = port  # of its own: the last run's would still \
tell the addresses that this one left
    importlib.import_module(script).main(flags)
"""


def write_data(data: Path) -> None:
    """Weights, labelled images, copies with one distractor, masks and videos."""
    torch.manual_seed(0)
    test_runs.write_photos(data / "bright")
    test_transfer.write_photos(data / "dark")
    write_creatures(data / "creatures")
    torch.save(build_backbone("vit_nano", 8, 48, init_std=0.2).state_dict(), data / "weights.pth")
    for i, (name, n) in enumerate(
        (("few/fish", 3), ("few/snail", 4), ("more/leaf", 11), ("more/turtle", 13))
    ):
        save_creatures(data / "photos" / name, n, seed=i)
    save_creatures(data / "one", 1, seed=4)
    write_copydays(data / "copies", 7)
    for name, listed in (
        ("voc", "one\nnone\nthree\n"),
        ("voc_of_two", "none\nthree\n"),
        ("voc_of_one", "three\n"),
    ):
        (write_voc(data / name) / "ImageSets/Segmentation/val.txt").write_text(listed)
    write_davis(data / "davis")
    (write_davis(data / "davis_of_one") / "ImageSets/2017/val.txt").write_text("snail\n")


def commands(folder: Path, processes: int) -> list[list[str]]:
    """Script and flags of each run, as so many processes are to make it, into
    FOLDER/PROCESSES/NAME.
    """
    return [
        [
            word.format(
                data=folder / "data", output=folder / str(processes) / name, batch=8 // processes
            )
            for word in command.split()
        ]
        for name, command in (LEARNING | EVALUATIONS).items()
    ]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory) -> Path:
    """The folder where all runs were made, by two processes of one launch and meanwhile by this
    one.
    """
    folder = tmp_path_factory.mktemp("processes")
    write_data(folder / "data")
    alone, together = commands(folder, 1), commands(folder, 2)
    with ExitStack() as held:  # so that all ports differ
        sockets = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in together]
        runs = [[str(one.getsockname()[1]), *run] for one, run in zip(sockets, together)]
    (folder / "runs.json").write_text(json.dumps(runs))
    (folder / "driver.py").write_text(DRIVER)
    environment = {
        name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")
    }
    both = subprocess.Popen(
        [
            sys.executable,
            *"-m torch.distributed.run --standalone --nproc_per_node=2".split(),
            folder / "driver.py",
            folder / "runs.json",
        ],
        cwd=REPO,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment | {"PYTHONPATH": str(REPO)},
    )
    try:
        for script, *flags in alone:
            importlib.import_module(script).main(flags)
        said, _ = both.communicate(timeout=300)
    finally:
        both.terminate()
    assert both.returncode == 0, said
    return folder


def result(output: Path) -> dict:
    """The one line of results."""
    lines = (output / "results.jsonl").read_text().splitlines()
    assert len(lines) == 1, f"one process alone tells what was measured, not {len(lines)}"
    return json.loads(lines[0])


def load(file: Path) -> dict:
    return torch.load(file, weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in LEARNING if name.startswith("training")])
def test_two_processes_train_as_one_with_the_double_batch(outputs, name):
    """Center, weights and k-NN; without drop path, whose masks are drawn per process."""
    one, two = (outputs / processes / name for processes in "12")
    alone, pair = load(one / "checkpoint.pth"), load(two / "checkpoint.pth")
    torch.testing.assert_close(
        pair["dino_loss"]["center"], alone["dino_loss"]["center"], atol=1e-5, rtol=1e-4
    )
    for key, value in alone["teacher"].items():
        torch.testing.assert_close(
            pair["teacher"][key], value, atol=2e-4, rtol=1e-3, msg=f"{key} differs"
        )
    for ours, theirs in zip(test_runs.log_of(one), test_runs.log_of(two), strict=True):
        assert theirs.keys() == ours.keys()
        assert all(theirs[key] == pytest.approx(ours[key], abs=1e-3) for key in ours)


@pytest.mark.slow
def test_two_processes_train_the_linear_heads_of_one_with_the_double_batch(outputs):
    one, two = (outputs / processes / "linear" for processes in "12")
    assert_same(load(one / "linear.pth"), load(two / "linear.pth"), atol=1e-6, rtol=1e-5)
    assert result(one)["measured"] == result(two)["measured"]


@pytest.mark.slow
def test_two_processes_fine_tune_as_one_with_the_double_batch(outputs):
    """Without mixing and dropped paths, which each process draws for itself.

    Not the keys' biases: softmax is blind to them, and AdamW makes whole steps of the rounding of
    their gradient 0.
    """
    one, two = (outputs / processes / "fine-tuning" for processes in "12")
    assert result(one)["measured"] == result(two)["measured"], (
        "one table a run, of the same numbers"
    )
    alone, pair = test_transfer.weights_of(one), test_transfer.weights_of(two)
    for name, before in test_transfer.small_network(classes=2).state_dict().items():
        keys = slice(128, 256) if "qkv.bias" in name else slice(0)
        moved, differ = (alone[name] - before).abs(), (alone[name] - pair[name]).abs()
        differ[keys] = 0
        assert moved.max() > 1e-4, f"{name} was hardly trained: nothing could be told from it"
        assert differ.max() < 1e-5, f"{name} differs by {differ.max()}"


@pytest.mark.slow
@pytest.mark.parametrize("name", EVALUATIONS)
def test_an_evaluation_tells_the_same_figures_from_two_processes(outputs, name):
    """And writes the same files; a process without an image, an object or a video takes part as
    well.
    """
    one, two = (outputs / processes / name for processes in "12")
    alone, together = result(one), result(two)
    assert together["measured"] == pytest.approx(alone["measured"], abs=1e-3)
    assert {**together, "measured": 0, "flags": 0, "time": 0} == {
        **alone,
        "measured": 0,
        "flags": 0,
        "time": 0,
    }
    written = [
        sorted(path.relative_to(output) for path in output.rglob("*")) for output in (one, two)
    ]
    assert written[0] == written[1]
