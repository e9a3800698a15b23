"""Table 2's linear heads: SGD by hand, a sweep in one pass against one head at a time, and whole
runs, very small.
"""

import argparse
import ast
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from test_bad_input import error_of

from data import Images
from evals import linear
from evals.linear import (
    FrozenFeatures,
    TrainingView,
    accuracies,
    blocks_to_read,
    make_heads,
    make_optimizer,
    make_source,
    set_lr,
    train_epoch,
)
from features import EvaluationView, Pixels, extract_features
from runtime.creatures import CLASSES, make_creatures
from runtime.hardware import World
from runtime.sampling import EpochBatches
from training.backbone import build_backbone
from vit import VisionTransformer

HERE = World(0, 1, torch.device("cpu"), torch.float32)


def small_vit() -> VisionTransformer:
    torch.manual_seed(0)
    return (
        VisionTransformer(7, 14, embed_dim=22, depth=3, num_heads=2, init_std=0.2)
        .eval()
        .requires_grad_(False)
    )


def test_features_are_the_last_blocks_cls_tokens_joined_then_the_mean_patch():
    """Appendix F.2: ViT-S joins [CLS] of the last blocks, ViT-B the last [CLS] and the mean patch
    token.
    """
    vit, images = small_vit(), torch.randn(5, 3, 14, 14)
    x, outputs = vit.tokens(images), []
    for block in vit.blocks:
        x = block(x)
        outputs.append(vit.norm(x))
    like_small = torch.cat([outputs[1][:, 0], outputs[2][:, 0]], dim=1)
    like_base = torch.cat([outputs[2][:, 0], sum(outputs[2][:, i] for i in range(1, 5)) / 4], dim=1)
    torch.testing.assert_close(FrozenFeatures(vit, 2, False)(images), like_small)
    torch.testing.assert_close(FrozenFeatures(vit, 1, True)(images), like_base)
    for n, avgpool in ((1, False), (2, False), (3, True)):
        network = FrozenFeatures(vit, n, avgpool)
        assert network(images).shape == (5, network.width), "the heads are made for this width"


def test_a_convnet_gives_its_pooled_features():
    convnet, images = build_backbone("resnet18").eval(), torch.randn(2, 3, 37, 37)
    network = FrozenFeatures(convnet, *blocks_to_read(flags_of(), convnet, "resnet18"))
    with torch.no_grad():
        assert torch.equal(network(images), convnet(images)) and network.width == 512


def flags_of(n_last_blocks: int = 0, avgpool_patchtokens: bool | None = None) -> SimpleNamespace:
    return SimpleNamespace(n_last_blocks=n_last_blocks, avgpool_patchtokens=avgpool_patchtokens)


def test_what_is_read_follows_the_arch_unless_flags_say_otherwise():
    vit = VisionTransformer(7, 14, embed_dim=4, depth=5, num_heads=2)
    assert (
        blocks_to_read(flags_of(), vit, "vit_small")
        == blocks_to_read(flags_of(), vit, "vit_nano")
        == (4, False)
    )
    assert blocks_to_read(flags_of(), vit, "vit_base") == (1, True)
    assert blocks_to_read(flags_of(3, True), vit, "vit_small") == (3, True)
    assert blocks_to_read(flags_of(2, False), vit, "vit_base") == (2, False), (
        "false must override ViT-B's true"
    )


def toy(n: int = 31, d: int = 5, classes: int = 3) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of features and labels that mean nothing."""
    generator = torch.Generator().manual_seed(3)
    features, labels = torch.randn(n, d, generator=generator), torch.arange(n) % classes
    return list(zip(features.split(11), labels.split(11)))


def trained(lrs: list[float], batches, epochs: int = 4, classes: int = 3) -> torch.nn.ModuleList:
    heads = make_heads(batches[0][0].shape[1], classes, len(lrs))
    optimizer = make_optimizer(heads, lrs, 256)
    for epoch in range(epochs):
        set_lr(optimizer, epoch, epochs)
        train_epoch(heads, optimizer, batches, HERE)
    return heads


def test_heads_side_by_side_are_each_the_head_trained_alone():
    lrs = [0.01, 0.3, 2.0]
    together = trained(lrs, toy())
    for lr, head in zip(lrs, together, strict=True):
        (alone,) = trained([lr], toy())
        torch.testing.assert_close(head.weight, alone.weight, atol=1e-6, rtol=0)
        torch.testing.assert_close(head.bias, alone.bias, atol=1e-6, rtol=0)
    assert (together[0].weight - together[2].weight).abs().max() > 0.1, (
        "each head must have its own learning rate"
    )


def test_a_head_that_diverges_leaves_the_others_alone():
    good, bad = trained([0.3, 1e38], [(100 * features, labels) for features, labels in toy()])
    (alone,) = trained([0.3], [(100 * features, labels) for features, labels in toy()])
    assert not bad.weight.isfinite().all() and torch.equal(good.weight, alone.weight)
    features, labels = toy()[0]
    assert accuracies([bad], features, labels) == [(0.0, 0.0)], (
        "topk counts NaN as the largest logit"
    )


def test_an_epoch_is_sgd_with_momentum_and_without_decay():
    """g = (softmax(W x + b) - 1_y) x^T, averaged; v <- 0.9 v + g; W <- W - lr v, with lr = base *
    batch / 256.
    """
    (head,) = make_heads(5, 3, 1)
    weight, bias = head.weight.detach().clone(), head.bias.detach().clone()
    velocity, bias_velocity = torch.zeros(3, 5), torch.zeros(3)
    heads = make_heads(5, 3, 1)
    optimizer = make_optimizer(heads, [0.5], 512)
    set_lr(optimizer, 0, 1)
    losses = []
    for features, labels in toy():
        logits = features @ weight.T + bias
        losses.append(torch.nn.functional.cross_entropy(logits, labels))
        error = (logits.softmax(dim=1) - torch.eye(3)[labels]) / len(labels)
        velocity, bias_velocity = (
            0.9 * velocity + error.T @ features,
            0.9 * bias_velocity + error.sum(dim=0),
        )
        weight, bias = weight - 1.0 * velocity, bias - 1.0 * bias_velocity
    torch.testing.assert_close(
        train_epoch(heads, optimizer, toy(), HERE), torch.stack(losses).mean().view(1)
    )
    torch.testing.assert_close(heads[0].weight.detach(), weight)
    torch.testing.assert_close(heads[0].bias.detach(), bias)


def test_the_learning_rate_scales_with_the_batch_and_falls_on_a_cosine_to_zero():
    optimizer = make_optimizer(make_heads(5, 3, 2), [0.001, 0.01], 1024)
    values = {}
    for epoch in (0, 25, 50, 99, 100):
        set_lr(optimizer, epoch, 100)
        values[epoch] = [group["lr"] for group in optimizer.param_groups]
    assert values[0] == pytest.approx([0.004, 0.04]) and values[50] == pytest.approx([0.002, 0.02])
    assert values[25] == pytest.approx([0.002 * (1 + math.sqrt(0.5)), 0.02 * (1 + math.sqrt(0.5))])
    assert 0 < values[99][0] < 2e-6 and values[100] == pytest.approx([0, 0])
    assert all(
        group["weight_decay"] == 0 and group["momentum"] == 0.9 for group in optimizer.param_groups
    )


def test_heads_start_alike_as_the_releases_classifier():
    heads = make_heads(211, 101, 2, seed=7)
    assert (
        heads[0].weight.std().item() == pytest.approx(0.01, rel=0.03) and heads[0].bias.eq(0).all()
    )
    assert torch.equal(heads[0].weight, heads[1].weight) and heads[0].weight is not heads[1].weight
    assert not torch.equal(heads[0].weight, make_heads(211, 101, 1, seed=8)[0].weight)


def test_classes_that_a_plane_divides_are_learnt_to_the_last_image():
    labels = torch.arange(77) % 7
    features = torch.eye(7)[labels] + 0.05 * torch.randn(
        77, 7, generator=torch.Generator().manual_seed(0)
    )
    heads = trained(
        [1e-9, 3.0], list(zip(features.split(11), labels.split(11))), epochs=20, classes=7
    )
    untrained, learnt = accuracies(heads, features, labels)
    assert learnt == (100.0, 100.0), "every class has a direction of its own"
    assert untrained[0] < 60, "a learning rate of nothing must learn nothing"


def test_heads_trained_on_kept_features_decide_as_least_squares_onto_one_hot_targets():
    """W = argmin |X W - Y|^2, Y one-hot, X with a column of ones: the same class for each held-out
    image.
    """
    generator, view = torch.Generator().manual_seed(0), EvaluationView(5, 1.0)
    labels = torch.arange(211 + 53)[torch.randperm(264, generator=generator)] % 7
    colours, noise = (
        torch.rand(7, 3, 5, 5, generator=generator),
        torch.rand(264, 3, 5, 5, generator=generator),
    )
    images = Images((150 * colours[labels] + 100 * noise).byte(), labels)
    learnt, test = images.subset(torch.arange(211)), images.subset(torch.arange(211, 264))
    flags = SimpleNamespace(cached=True, epochs=13, lr=[0.3], batch_size=31, num_workers=0, seed=0)
    batches, heads = EpochBatches(211, 31, 1, 0, 1, 0), make_heads(75, 7, 1)
    kept, held_out = (extract_features(Pixels(), part, view, HERE) for part in (learnt, test))
    source = make_source(Pixels(), learnt, view, batches, flags, HERE)
    linear.train_heads(
        heads, source, batches, lambda: accuracies(heads, held_out, test.labels), flags, HERE
    )
    with_ones = lambda features: torch.cat([features, torch.ones(len(features), 1)], dim=1)
    solution = torch.linalg.lstsq(with_ones(kept), torch.eye(7)[learnt.labels]).solution
    closed_form = (with_ones(held_out) @ solution).argmax(dim=1)
    assert torch.equal(closed_form, test.labels), "the classes were meant to be separable"
    assert accuracies(heads, held_out, test.labels)[0] == (100.0, 100.0), (
        "SGD must find such a separation too"
    )
    assert torch.equal(heads[0](held_out).argmax(dim=1), closed_form)


def test_the_training_view_crops_flips_and_normalises():
    view = TrainingView(EvaluationView(16, mean=(0, 0, 0), std=(1, 1, 1)))
    ramp = torch.arange(240, dtype=torch.uint8).expand(3, 120, 240)
    torch.manual_seed(0)
    seen = [view(ramp)[0].mean(dim=0) for _ in range(60)]
    rising = [(row[-1] > row[0]).item() for row in seen]
    widths = [(row.max() - row.min()).item() * 255 / 240 for row in seen]
    assert 15 < sum(rising) < 45, "half of the views are mirrored"
    assert min(widths) < 0.3 and max(widths) > 0.45, "a crop holds 8 to 100 % of the area"
    constant = TrainingView(EvaluationView(16, mean=(0.5,) * 3, std=(0.1, 0.2, 0.5)))
    pixel = constant(torch.full((3, 40, 50), 255, dtype=torch.uint8))
    torch.testing.assert_close(pixel, torch.tensor([5.0, 2.5, 1.0]).view(3, 1, 1).expand(3, 16, 16))


def write_creatures(folder: Path) -> Path:
    """A tiny part of the embedded images, as files: 40 train images, 20 test images."""
    drawn = make_creatures(60, side=32)
    for i, (image, label) in enumerate(zip(drawn.images, drawn.labels.tolist())):
        path = folder / ("train" if i < 40 else "val") / CLASSES[label] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    return folder


@pytest.fixture(scope="module")
def creatures(tmp_path_factory) -> Path:
    return write_creatures(tmp_path_factory.mktemp("creatures"))


def weights_file(folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    backbone = build_backbone("vit_nano", 16, 32, init_std=0.07)
    torch.save(backbone.state_dict(), folder / f"{seed}.pth")
    return folder / f"{seed}.pth"


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return weights_file(tmp_path_factory.mktemp("weights"), 0)


def command(creatures: Path, weights: Path, output: Path, *more: str) -> list[str]:
    flags = [
        "--pretrained_weights",
        weights,
        "--data_path",
        creatures,
        "--eval_size",
        "32",
        "--device",
        "cpu",
        "--num_workers",
        "0",
        "--epochs",
        "3",
        "--lr",
        "0.03",
        "0.3",
        "--batch_size",
        "8",
        "--output_dir",
        output,
        "--results",
        output / "results.jsonl",
        *more,
    ]
    return [str(flag) for flag in flags]


def run(*args) -> tuple[dict, dict]:
    """The checkpoint of the heads and the last line of results."""
    output = args[2]
    linear.main(command(*args))
    return (
        torch.load(output / "linear.pth", weights_only=True),
        json.loads((output / "results.jsonl").read_text().splitlines()[-1]),
    )


def assert_same(a: dict, b: dict, **tolerance) -> None:
    for name, value in a["heads"].items():
        torch.testing.assert_close(b["heads"][name], value, msg=f"{name} differs", **tolerance)


@pytest.fixture(scope="module")
def trained_once(creatures, weights, tmp_path_factory) -> tuple[dict, dict]:
    return run(creatures, weights, tmp_path_factory.mktemp("trained_once"))


def test_the_whole_sweep_and_its_best_are_reported(trained_once):
    measured = trained_once[1]["measured"]
    sweep = {lr: measured[f"lr {lr}, top-1 %"] for lr in ("0.03", "0.3")}
    best = max(sweep, key=sweep.get)
    assert measured[f"vit_nano, best (lr {best}), top-1 %"] == sweep[best] and len(measured) == 6
    data = trained_once[1]["data"]
    assert "40 images train, 20 test (the test part), 10 classes, 32 pixels; 3 epochs" in data


def test_the_untrained_network_of_the_same_run_is_evaluated_too(creatures, tmp_path):
    """By its own seed: the rows of a run that has not moved from its start are equal."""
    start, args = tmp_path / "start.pth", {"arch": "vit_nano", "patch_size": 16, "seed": 5}
    torch.manual_seed(5)
    backbone = build_backbone("vit_nano", 16, 224)
    teacher = {f"backbone.{name}": value for name, value in backbone.state_dict().items()}
    torch.save({"teacher": teacher, "args": args}, start)
    measured = run(creatures, start, tmp_path, "--cached")[1]["measured"]
    trained = [value for name, value in measured.items() if name.startswith("vit_nano, best")]
    untrained = [value for name, value in measured.items() if name.startswith("untrained, best")]
    assert len(trained) == 2 and trained == untrained


PROTOCOLS = [  # the flags, and the paper's number of ViT-S/16 on ImageNet by them, or None
    ("", 77.0),
    ("--n_last_blocks 1", 76.1),
    ("--n_last_blocks 2", 76.6),
    ("--n_last_blocks 6", 77.0),
    ("--n_last_blocks 3", None),
    ("--avgpool_patchtokens true", None),
    ("--epochs 5", None),
    ("--fraction 0.01", None),
    ("--cached", 75.7),
    ("--cached --fraction 0.1", 72.2),
    ("--cached --fraction 0.01", 64.5),
    ("--cached --fraction 0.02", None),
]


@pytest.mark.parametrize(("flags", "number"), PROTOCOLS)
def test_the_paper_s_number_is_of_the_same_protocol_or_none(flags, number):
    parsed = argparse.Namespace(
        dataset="imagenet", data_path="", epochs=100, fraction=1.0, cached=False,
        n_last_blocks=0, avgpool_patchtokens=None,
    )
    for name, value in re.findall(r"--(\w+) ?([\w.]*)", flags):
        setattr(parsed, name, ast.literal_eval(value.capitalize() or "True"))
    args = {"arch": "vit_small", "patch_size": 16}
    read = linear.blocks_to_read(parsed, build_backbone("vit_tiny"), "vit_small")
    assert linear.paper_number(parsed, args, 1000, 224, read) == number
    parsed.dataset = "cifar10"
    assert linear.paper_number(parsed, args, 10, 224, read) is None, "another data set"


def test_vit_b_s_number_depends_on_the_mean_patch_token():
    flags = argparse.Namespace(dataset="", epochs=100, fraction=1.0, cached=False)
    args = {"arch": "vit_base", "patch_size": 16}
    found = [linear.paper_number(flags, args, 1000, 224, (1, pool)) for pool in (True, False)]
    assert found == [78.2, 78.0]


def test_the_heads_are_kept_as_they_were_evaluated_and_the_same_seed_trains_the_same_ones(
    trained_once, creatures, weights, tmp_path
):
    """The crops are functions of (seed, epoch, image), whatever the number of workers."""
    kept, line = run(creatures, weights, tmp_path, "--num_workers", "1")
    assert_same(trained_once[0], kept, atol=0, rtol=0)
    assert line["measured"] == trained_once[1]["measured"] and kept["lr"] == [0.03, 0.3]


def test_a_fraction_of_the_labels_is_learnt_from(creatures, weights, tmp_path):
    _, line = run(creatures, weights, tmp_path, "--fraction", "0.5", "--cached", "--epochs", "1")
    counts = [len(list(folder.iterdir())) for folder in (creatures / "train").iterdir()]
    learnt_from = sum(max(1, round(0.5 * count)) for count in counts)
    assert f"{learnt_from} images train, 20 test" in line["data"], (
        "half of each class, at least one"
    )


def test_fewer_images_than_a_batch_are_one_batch(creatures, weights, tmp_path, monkeypatch):
    """EpochBatches drops an incomplete batch, which here would be all there is; and the lr follows
    the true batch.
    """
    made = []
    monkeypatch.setattr(
        linear, "make_optimizer", lambda *args: made.append(make_optimizer(*args)) or made[0]
    )
    checkpoint, _ = run(creatures, weights, tmp_path, "--batch_size", "1000", "--cached")
    assert made[0].param_groups[1]["peak_lr"] == pytest.approx(0.3 * 40 / 256)
    assert checkpoint["heads"]["1.bias"].abs().max() > 0, "something must have been trained"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--lr", "0.1", "0"], "--lr [0.1, 0.0] must be above 0"),
        (["--lr", "nan"], "--lr [nan] must be finite"),
        (["--epochs", "0"], "--epochs 0 must be at least 1"),
        (["--fraction", "0"], "--fraction 0.0 must be above 0 and at most 1"),
        (["--n_last_blocks", "5"], "--n_last_blocks 5 is more than the 4 blocks of vit_nano"),
        (["--avgpool_patchtokens", "maybe"], "'maybe' is neither true nor false"),
        (["--data_path", "{creatures}/val/fish"], "no labels to learn from"),
    ],
)
def test_bad_input_is_one_line_with_its_fix(creatures, weights, tmp_path, capsys, flags, said):
    flags = [flag.format(creatures=creatures) for flag in flags]
    assert said in error_of(linear.main, capsys, *command(creatures, weights, tmp_path, *flags))


@pytest.mark.slow
def test_a_convnet_is_evaluated_too(creatures, tmp_path):
    torch.save(build_backbone("resnet50").state_dict(), tmp_path / "resnet50.pth")
    _, line = run(creatures, tmp_path / "resnet50.pth", tmp_path, "--epochs", "1", "--cached")
    assert (line["arch"], line["paper"]) == ("resnet50", {}), "75.3 % is of ImageNet"
    best = [name for name in line["measured"] if "best" in name]
    assert len(best) == 4, "top-1 and top-5, trained and untrained"


@pytest.mark.slow
def test_without_images_the_embedded_ones_are_learnt_from_kept_features(weights, tmp_path):
    linear.main(
        [
            "--pretrained_weights",
            str(weights),
            "--eval_size",
            "32",
            "--device",
            "cpu",
            "--epochs",
            "3",
            "--lr",
            "0.5",
            "--results",
            str(tmp_path / "r.jsonl"),
        ]
    )
    line = json.loads((tmp_path / "r.jsonl").read_text())
    assert "4000 images train, 1000 test" in line["data"] and "centre views" in line["data"]
    assert line["measured"]["lr 0.5, top-1 %"] > 15, (
        "even an untrained network tells more than chance"
    )


def test_a_frozen_convnet_stays_as_it_is_while_heads_are_trained_on_it():
    """Its batch normalisations keep their statistics: extracting features must not put it into
    training mode.
    """
    backbone = build_backbone("resnet18").eval()
    network = linear.FrozenFeatures(backbone, 1, False)
    images = Images(torch.zeros(3, 3, 32, 32, dtype=torch.uint8))
    extract_features(
        network, images, EvaluationView(32, 1.0), World(0, 1, torch.device("cpu"), torch.float32)
    )
    assert not any(module.training for module in backbone.modules())
