"""The record's step is train.py's, and it prints an epoch's numbers."""

import copy
import json

import pytest
import torch
from torch import nn
from torchvision.transforms.v2.functional import to_pil_image

import train
from bench import record
from bench import step as bench_step
from optimizer import clip_gradients, parameter_groups
from runtime.creatures import make_creatures
from runtime.hardware import World
from settings import parse_settings
from teacher import make_teacher, update_teacher
from train import Schedules
from training.checkpoint import load_backbone
from training.run_state import start_run

CPU = torch.device("cpu")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small_network() -> nn.Module:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(7, 5), nn.LayerNorm(5), nn.Linear(5, 3))
    network(torch.randn(11, 7)).square().sum().backward()
    return network


@pytest.mark.parametrize("most", [0.0, 0.5])
def test_clipping_at_once_is_clipping_one_by_one(most):
    one_by_one = small_network()
    at_once = small_network()
    norm = clip_gradients(one_by_one, most)
    torch.testing.assert_close(record.clip_at_once(at_once, most), norm)
    for ours, theirs in zip(at_once.parameters(), one_by_one.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_the_teacher_updated_at_once_is_the_teacher():
    student = small_network()
    at_once = make_teacher(student)
    one_by_one = make_teacher(student)
    with torch.no_grad():
        for param in student.parameters():
            param.add_(1.0)
    record.update_teacher_at_once(student, at_once, torch.tensor(0.9))
    update_teacher(student, one_by_one, 0.9)
    for ours, theirs in zip(at_once.parameters(), one_by_one.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_tensor_adamw_is_adamw():
    """With a rate and a decay that change, on weights that decay and others."""
    ours = small_network()
    theirs = copy.deepcopy(ours)
    lr = torch.tensor(0.0)
    decay = torch.tensor(0.0)
    tensor_adamw = record.TensorAdamW(parameter_groups(ours), lr, decay)
    adamw = torch.optim.AdamW(parameter_groups(theirs), lr=0.0)
    for step in range(1, 4):
        lr.fill_(0.01 * step)
        decay.fill_(0.1 * step)
        for group in adamw.param_groups:
            group["lr"] = 0.01 * step
            if group["decays"]:
                group["weight_decay"] = 0.1 * step
        for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            one.grad = torch.randn(one.shape, generator=generator(step))
            other.grad = one.grad.clone()
        tensor_adamw.step()
        adamw.step()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other)


TINY = (
    "--preset demo --device cpu --precision fp32 --epochs 1 --batch_size_per_gpu 4 --out_dim 13 "
    "--global_crops_size 24 --local_crops_size 16 --local_crops_number 2 --warmup_epochs 0 "
    "--eval_size 24 --side 29"
).split()


def test_the_step_from_tensors_is_the_step(monkeypatch):
    """What a CUDA graph captures, run as it is: frozen, then with the last layer."""
    monkeypatch.setattr(train, "clip_gradients", clip_gradients)  # GraphStep replaces it
    # a bias before a batch normalisation has no gradient but rounding, which Adam makes large
    settings = parse_settings([*TINY, "--use_bn_in_head", "false"], record.RecordSettings)
    world = World(0, 1, CPU, torch.float32)
    crops = bench_step.random_crops(settings, world)
    runs = []
    for kind in (record.EagerStep, record.GraphStep):
        run = start_run(settings, world)
        step = kind(run, settings, world)
        metrics = []
        for frozen in (True, False):
            now = Schedules(0.01, 0.2, 0.9, 0.05, last_layer_frozen=frozen)
            torch.manual_seed(3)
            if kind is record.EagerStep:
                metrics.append(step(crops, now))
            else:
                step.write_inputs(crops, now)
                metrics.append(step.captured(frozen))
        runs.append((run, torch.stack(metrics)))
    (eager, eager_metrics), (graph, graph_metrics) = runs
    torch.testing.assert_close(graph_metrics, eager_metrics, atol=1e-4, rtol=1e-4)
    for part in ("student", "teacher", "dino_loss"):
        weights = getattr(graph, part).state_dict()
        for name, wanted in getattr(eager, part).state_dict().items():
            if name.endswith("qkv.bias"):
                continue  # nor has the keys'
            error = (weights[name] - wanted).abs().max().item()
            assert error < 1e-3, f"{part}.{name} differs by {error}"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")
def test_both_graphs_are_captured_and_replayed(folder, tmp_path, capsys, monkeypatch):
    """Six steps an epoch: four before a capture, two replays; the last layer frozen and not."""
    monkeypatch.setattr(train, "clip_gradients", clip_gradients)
    flags = ["--data_path", str(folder), "--output_dir", str(tmp_path / "run")]
    flags += "--device cuda --compile false --batch_size_per_gpu 2 --epochs 2".split()
    record.main([*TINY, *flags])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["epoch"] for row in rows[1:3]] == [1, 2]


@pytest.fixture
def folder(tmp_path):
    """train/ with 12 and val/ with 4 images, of two classes and of several sizes."""
    for i, image in enumerate(make_creatures(16, side=41).images):
        part = "val" if i >= 12 else "train"
        path = tmp_path / "images" / part / f"class{i % 2}"
        path.mkdir(parents=True, exist_ok=True)
        to_pil_image(image[:, : 30 + i]).save(path / f"{i}.png")
    return tmp_path / "images"


def test_an_epoch_of_the_record_prints_its_rows_and_saves_the_teacher(folder, tmp_path, capsys):
    record.main([*TINY, "--data_path", str(folder), "--output_dir", str(tmp_path / "run")])
    start, epoch, end = map(json.loads, capsys.readouterr().out.splitlines())
    assert start["images"] == 12 and start["test_images"] == 4
    assert start["device"] == "cpu" and start["settings"]["side"] == 29
    assert 0 <= start["knn_untrained"] <= 100 and 0 <= start["knn_pixels"] <= 100
    assert set(epoch) == {
        "epoch", "loss", "entropy", "kl", "gradient_norm", "images_per_s", "seconds",
        "knn_teacher", "knn_student",
    }
    assert epoch["epoch"] == 1
    assert epoch["loss"] == pytest.approx(epoch["entropy"] + epoch["kl"], abs=1e-3)
    backbone, args = load_backbone(end["saved"])
    assert args["arch"] == "vit_nano" and args["eval_size"] == 24
    assert not backbone.training


def test_the_record_ends_after_its_limit(folder, tmp_path, capsys):
    flags = ["--data_path", str(folder), "--output_dir", str(tmp_path / "run")]
    record.main([*TINY, *flags, "--epochs", "1000", "--limit", "1e-9"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 3 and rows[1]["epoch"] == 1
    assert "knn_teacher" in rows[1], "the last epoch is evaluated"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--limit 0", "--limit 0.0 must be above 0"),
        ("--every 0", "--every 0 must be at least 1"),
        ("--side 0", "--side 0 must be at least 1"),
        ("--accumulate 2", "--accumulate 2 is for train.py"),
        ("--batch_size_per_gpu 13", "--batch_size_per_gpu 13 is more than the 12 images"),
        ("--lr 1e30", "lower --lr"),
    ],
)
def test_a_bad_flag_is_named_in_one_line(folder, tmp_path, flags, said, capsys):
    common = ["--data_path", str(folder), "--output_dir", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as stopped:
        record.main([*TINY, *common, *flags.split()])
    written = capsys.readouterr().err
    assert stopped.value.code == 2 and said in written, written
    assert len(written.strip().splitlines()) == 1
