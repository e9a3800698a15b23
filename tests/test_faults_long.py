"""Long runs: memory, open files and threads stay flat over thousands of steps; a long log stays
quick.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from killing import REPO

from training import report, run_state

pytestmark = [pytest.mark.faults, pytest.mark.slow]
STEPS = """
import json, os, resource, sys
from pathlib import Path
import torch
from PIL import Image
import numpy as np
import train
from runtime.hardware import World
from head import DINOHead
from loss import DINOLoss
from multicrop import MultiCropNetwork
from optimizer import make_optimizer
from training.hooks import Hooks
from training.run_state import RunState
from settings import parse_settings
from teacher import make_teacher
from vit import VisionTransformer

torch.set_num_threads(1)
folder = Path(sys.argv[1])
for i in range(100):
    Image.fromarray(np.random.default_rng(i).integers(0, 255, (20, 24, 3), dtype=np.uint8))\
.save(folder / f"{i}.png")
world = World(0, 1, torch.device("cpu"), torch.float32)
settings = parse_settings("--preset demo --patch_size 8 --global_crops_size 8 --local_crops_size 8 \
--eval_size 8 "
                          "--local_crops_number 0 --batch_size_per_gpu 1 --num_workers 1 \
--in_memory false --device cpu --epochs 50 "
                          "--warmup_epochs 1 --knn_every 0 --saveckp_freq 0 --out_dim 7".split()
                          + ["--data_path", str(folder), "--output_dir", str(folder / "run")])

def start_run(settings, world):
    student = MultiCropNetwork(VisionTransformer(8, 8, embed_dim=6, depth=1, num_heads=1),
                               DINOHead(6, 7, hidden_dim=5, bottleneck_dim=3))
    return RunState(student, make_teacher(student), DINOLoss(7), make_optimizer("adamw", student))

def use(pid):
    resident = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()
    return resident, len(os.listdir(f"/proc/{pid}/fd")), len(os.listdir(f"/proc/{pid}/task"))

def note(run, world):  # before the checkpoint at the end of an epoch of 100 steps
    if run.epoch in (10, 30, 50):
        worker = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()[0]
        print("used", json.dumps([use(os.getpid()), use(worker)]), flush=True)

train.train(settings, world, [], Hooks(start_run=start_run, before_save=note))
"""


def test_memory_files_and_threads_stay_flat_over_five_thousand_steps(tmp_path):
    """Of the training and its loader's worker, after 1,000, 3,000 and 5,000 steps: within 2 %."""
    if not Path("/proc/self/statm").exists():
        pytest.skip("only Linux tells these")
    ended = subprocess.run(
        [sys.executable, "-c", STEPS, str(tmp_path)],
        cwd=REPO,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"},
        timeout=600,
    )
    assert ended.returncode == 0, ended.stderr
    lines = [line for line in ended.stdout.splitlines() if line.startswith("used")]
    measured = [json.loads(line.removeprefix("used")) for line in lines]
    print(measured)
    assert len(measured) == 3
    for who in (0, 1):
        first, *later = [one[who] for one in measured]
        for one in later:
            assert one[0] <= 1.02 * first[0], (
                f"resident memory grew from {first[0]} to {one[0]} bytes"
            )
            assert one[1:] == first[1:], "open files and threads must stay as many as they were"


def record(epoch: int) -> dict:
    return {
        "epoch": epoch,
        "train_loss": 3.0,
        "train_lr": 1e-3,
        "train_wd": 0.1,
        "teacher_temp": 0.04,
        "teacher_momentum": 0.99,
        "images_per_s": 1000.0,
        "train_entropy": 2.0,
        "train_kl": 1.0,
        "knn_teacher": 70.0,
        "knn_student": 70.0,
        "entropy_curve": [2.0] * 20,
        "kl_curve": [1.0] * 20,
    }


def test_the_log_and_the_curves_of_a_million_steps_are_quick(tmp_path):
    """A line an epoch, and up to 20 values of entropy and KL in it: 50,000 epochs have a million of
    each.
    """
    history = [
        {"epoch": -1, "knn_untrained": 20.0, "knn_pixels": 50.0},
        *map(record, range(50_000)),
    ]
    began = time.process_time()
    run_state.write_log(tmp_path / "log.txt", history)
    written = time.process_time()
    report.draw_curves(history, 4096).savefig(tmp_path / "curves.png")
    drawn = time.process_time()
    print(f"50,000 lines: log {written - began:.2f} s, curves {drawn - written:.2f} s")
    assert len((tmp_path / "log.txt").read_text().splitlines()) == 50_001
    assert written - began < 10 and drawn - written < 20
