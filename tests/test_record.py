"""Crops in batches are the crops of one image; the record's step is train.py's."""

import copy
import json
from functools import partial

import pytest
import torch
from torch import nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import resize, to_pil_image

import train
from bench import device_crops, record
from bench.device_crops import DeviceMultiCrop
from multicrop import MultiCrop
from optimizer import clip_gradients, parameter_groups
from runtime import augment
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


def uniform() -> device_crops.Uniform:
    return partial(torch.rand, generator=generator())


def columns_inside(views: torch.Tensor) -> torch.Tensor:
    """(3, S, S) -> (S, 3, S), and back."""
    return views.transpose(-3, -2)


@pytest.mark.parametrize("size", [224, 96, 37])
def test_crops_are_torchvisions_antialiased_bicubic_resize(size):
    """On 20 random boxes of an image with odd sides."""
    H, W = 151, 173
    image = torch.rand(3, H, W, generator=generator())
    boxes = device_crops.random_boxes(20, H, W, (0.05, 1.0), uniform())
    top, left, height, width = boxes.unbind(dim=1)
    rows = device_crops.resize_weights(top, height, H, size)
    columns = device_crops.resize_weights(left, width, W, size)
    images = columns_inside(image).expand(20, H, 3, W)
    ours = columns_inside(device_crops.resize(images, rows, columns))
    for crop, box in zip(ours, boxes.int().tolist(), strict=True):
        y, x, h, w = box
        cut = image[:, y : y + h, x : x + w]
        theirs = resize(cut, [size, size], InterpolationMode.BICUBIC, antialias=True)
        error = (crop - theirs).abs().max().item()
        assert error <= 1e-3, f"the box {box} at {size} pixels differs by {error}"


def test_one_product_serves_all_views_of_an_image():
    """Views are numbered image by image: view v of image b is row b * V + v."""
    images = torch.rand(2, 13, 3, 11, generator=generator())
    rows = torch.rand(2 * 5, 7, 13, generator=generator(1))
    columns = torch.rand(2 * 5, 7, 11, generator=generator(2))
    together = device_crops.resize(images, rows.view(2, 5 * 7, 13), columns)
    repeated = images.repeat_interleave(5, dim=0)
    torch.testing.assert_close(together, device_crops.resize(repeated, rows, columns))


def test_hue_and_grey_are_those_of_one_image():
    images = torch.rand(5, 3, 17, 17, generator=generator())
    images[0, :, :3] = 0.5  # grey has no hue
    angles = torch.tensor([0.1, -0.2, 0.5, -0.5, 0.0])
    turned = device_crops.hue(columns_inside(images), angles.view(5, 1, 1, 1))
    luma = device_crops.grey(columns_inside(images))
    for i, image in enumerate(images):
        wanted = augment.hue(image, angles[i].item())
        torch.testing.assert_close(columns_inside(turned[i]), wanted, atol=1e-5, rtol=0)
        torch.testing.assert_close(columns_inside(luma[i]), augment.grey(image))


@pytest.mark.parametrize("which", range(4))
def test_each_jitter_is_that_of_one_image(which):
    """Brightness, contrast, saturation, hue; the other three places stay as they are."""
    operation = (augment.brightness, augment.contrast, augment.saturation, augment.hue)[which]
    images = torch.rand(2, 3, 13, 13, generator=generator())
    order = torch.full((2, 4), device_crops.NOTHING)
    order[:, 2] = which
    amounts = torch.tensor([[1.4, 1.3, 1.2, 0.1], [0.6, 0.7, 0.8, -0.1]])
    none = torch.zeros(2, dtype=torch.bool)
    ours = device_crops.colours(columns_inside(images), order, amounts, none)
    for i, image in enumerate(images):
        wanted = operation(image, amounts[i, which].item())
        torch.testing.assert_close(columns_inside(ours[i]), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [37, 5])
def test_the_blur_matrix_is_the_gaussian_blur(size):
    """Also where the view is smaller than the kernel; sigma 0 changes nothing."""
    sigmas = torch.tensor([0.1, 0.3, 1.0, 1.7, 2.0, 0.0])
    image = torch.rand(3, size, size, generator=generator())
    matrices = device_crops.blur_weights(sigmas, size)
    for sigma, matrix in zip(sigmas.tolist(), matrices, strict=True):
        wanted = augment.gaussian_blur(image, sigma) if sigma else image
        torch.testing.assert_close(matrix @ image @ matrix.T, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("H", "W"), [(101, 97), (61, 151), (151, 61)])
def test_boxes_lie_inside_and_obey_scale_and_ratio(H, W):
    """A side is rounded by half a pixel at most; the rest is the law."""
    low, high = 0.1, 0.3
    boxes = device_crops.random_boxes(2003, H, W, (low, high), uniform())
    top, left, h, w = boxes.unbind(dim=1)
    assert torch.equal(boxes, boxes.round())
    assert (top >= 0).all() and (left >= 0).all()
    assert (top + h <= H).all() and (left + w <= W).all()
    assert ((h + 0.5) * (w + 0.5) >= low * H * W).all()
    assert ((h - 0.5) * (w - 0.5) <= high * H * W).all()
    assert ((w + 0.5) / (h - 0.5) >= 3 / 4).all()
    assert ((w - 0.5) / (h + 0.5) <= 4 / 3).all()
    assert (top == 0).any() and (top + h == H).any(), "no box touches the border"


def test_where_no_box_fits_it_is_the_largest_central_one():
    """The whole area in a strip of 20 x 100: its ratio is far from allowed."""
    boxes = device_crops.random_boxes(3, 20, 100, (1.0, 1.0), uniform())
    assert boxes.tolist() == [[0, 36, 20, 27]] * 3


def test_the_same_generator_gives_the_same_views():
    images = make_creatures(3, side=41).images.transpose(1, 2).contiguous()
    crop = DeviceMultiCrop(35, 14, local_number=5)
    views = crop(images, generator(7))
    again = crop(images, generator(7))
    others = crop(images, generator(8))
    assert [tuple(view.shape) for view in views] == [(3, 3, 35, 35)] * 2 + [(3, 3, 14, 14)] * 5
    assert all(map(torch.equal, views, again))
    assert not any(map(torch.equal, views, others))


def test_half_of_the_views_are_mirrored():
    """Of an image that is dark on the left; 1000 views: 3 standard errors are 0.05."""
    images = torch.zeros(100, 17, 3, 17, dtype=torch.uint8)
    images[..., 9:] = 255
    views = torch.cat(DeviceMultiCrop(16, 16, (1, 1), (1, 1), blur=(0, 0, 0))(images, generator()))
    mirrored = views[..., 0].mean(dim=(1, 2)) > views[..., -1].mean(dim=(1, 2))
    assert mirrored.float().mean().item() == pytest.approx(0.5, abs=0.05)


def test_the_chances_of_jitter_and_grey_are_the_papers():
    """On one colour, with brightness alone: 2000 views, 3 standard errors are 0.03."""
    colour = torch.tensor([150, 100, 50], dtype=torch.uint8)
    images = colour.view(3, 1).expand(1000, 11, 3, 11)
    still = {"blur": (0, 0, 0), "solarize": 0, "mean": (0, 0, 0), "std": (1, 1, 1)}
    crop = DeviceMultiCrop(8, local_number=0, jitter=(0.4, 0, 0, 0), **still)
    pixels = torch.cat(crop(images, generator()))[:, :, 4, 4]  # (2000, 3)
    are_grey = (pixels[:, 0] - pixels[:, 2]).abs() < 1e-3
    assert are_grey.float().mean().item() == pytest.approx(0.2, abs=0.03)

    factors = pixels[~are_grey, 1] / (100 / 255)
    jittered = (factors - 1).abs() > 1e-3
    assert jittered.float().mean().item() == pytest.approx(0.8, abs=0.03)
    assert 0.6 <= factors.min() < 0.62 and 1.38 < factors.max() <= 1.401


def statistics(views: torch.Tensor) -> torch.Tensor:
    """Mean, deviation, and the mean step to the next pixel, which a blur makes small."""
    steps = (views[..., 1:] - views[..., :-1]).abs()
    return torch.stack([views.mean(), views.std(), steps.mean()])


@pytest.mark.slow
def test_views_have_the_statistics_of_multicrop():
    """Of global 1 (always blurred), global 2 (solarised) and a local, on 400 creatures."""
    torch.manual_seed(0)
    images = make_creatures(400, side=64).images
    sizes = {"global_size": 48, "local_size": 24, "local_number": 1}
    one_by_one = MultiCrop(**sizes)
    theirs = [torch.stack(views) for views in zip(*map(one_by_one, images))]
    batch = images.transpose(1, 2).contiguous()
    ours = DeviceMultiCrop(**sizes)(batch, generator())
    for view in range(3):
        difference = (statistics(ours[view]) - statistics(theirs[view])).abs()
        assert difference.max() < 0.06, f"view {view}: {difference.tolist()}"


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
    pixels = make_creatures(7, side=29).images.transpose(1, 2).contiguous()
    batch = torch.tensor([0, 6, 2, 3])
    runs = []
    for kind in (record.EagerStep, record.GraphStep):
        run = start_run(settings, world)
        step = kind(run, pixels, settings, world)
        metrics = []
        for frozen in (True, False):
            now = Schedules(0.01, 0.2, 0.9, 0.05, last_layer_frozen=frozen)
            torch.manual_seed(3)
            if kind is record.EagerStep:
                metrics.append(step(batch, now))
            else:
                step.write_inputs(batch, now)
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
