"""Label propagation against a loop over all pairs of patches, and Table 5's run from DAVIS's layout
to its PNGs.
"""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from evals import davis as davis_module
from evals import video_segmentation as evs
from evals.davis import PALETTE, Video, region_similarity, scores, write_annotation
from runtime.creatures import DUSK, make_clip
from runtime.hardware import World
from training.backbone import build_backbone

HERE = World(0, 1, torch.device("cpu"), torch.float32)
ARGS = {"arch": "vit_nano", "patch_size": 8}


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return build_backbone("vit_nano", 8, 48, init_std=0.2).eval()


@pytest.fixture
def weights(network, tmp_path) -> Path:
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


def write_davis(root: Path) -> Path:
    """Two sequences of different shapes, in DAVIS's layout; the first has a palette of its own and
    objects 1 and 3.
    """
    (root / "ImageSets/2017").mkdir(parents=True)
    (root / "ImageSets/2017/val.txt").write_text("fish\nsnail\n")
    for name, (height, width), seed, palette in (
        ("fish", (50, 70), 1, PALETTE[::-1]),
        ("snail", (64, 48), 2, PALETTE),
    ):
        images, ids = make_clip(seed, frames=5, side=80, number=2)
        ids[ids == 2] = 3
        (root / "JPEGImages/480p" / name).mkdir(parents=True)
        for i in range(5):
            frame = Image.fromarray(images[i, :, :height, :width].movedim(0, -1).numpy())
            frame.save(root / "JPEGImages/480p" / name / f"{i:05}.jpg")
            mask = ids[i, :height, :width].contiguous()
            mask[4:20, 4:20], mask[30:44, 20:40] = (
                1,
                3,
            )  # some of each object, however the clip is cut
            write_annotation(root / "Annotations/480p" / name / f"{i:05}.png", mask, palette)
    return root


@pytest.fixture
def davis(tmp_path) -> Path:
    return write_davis(tmp_path / "DAVIS")


def run(weights, tmp_path, *flags) -> dict:
    evs.main(
        [
            str(flag)
            for flag in (
                "--pretrained_weights",
                weights,
                "--output_dir",
                tmp_path / "out",
                "--results",
                tmp_path / "results.jsonl",
                "--device",
                "cpu",
                *flags,
            )
        ]
    )
    return json.loads((tmp_path / "results.jsonl").read_text().splitlines()[-1])


def error_of(capsys, *flags) -> str:
    with pytest.raises(SystemExit) as stopped:
        evs.main([str(flag) for flag in flags])
    said = [line for line in capsys.readouterr().err.strip().splitlines() if "it/s" not in line]
    assert stopped.value.code == 2 and len(said) == 1, said
    return said[0]


@pytest.mark.parametrize(("radius", "topk"), [(2, 5), (1, 3), (0, 5), (12, 10**6)])
def test_propagation_agrees_with_a_loop_over_all_pairs(radius, topk):
    """label[i] = sum over the topk nearest j in a square window of exp(cos / T) label[j], over the
    weights' sum.
    """
    m, rows, cols, width, number = 3, 5, 7, 11, 2
    generator = torch.Generator().manual_seed(0)
    frame, context = (
        F.normalize(torch.randn(*shape, rows, cols, width, generator=generator), dim=-1)
        for shape in ((), (m,))
    )
    labels = torch.rand(m, rows, cols, number, generator=generator)
    found = evs.propagate(frame, context, labels, topk, radius, temperature=0.1)
    for y in range(rows):
        for x in range(cols):
            pairs = [
                (math.exp(float(frame[y, x] @ context[t, v, u]) / 0.1), labels[t, v, u])
                for t in range(m)
                for v in range(rows)
                for u in range(cols)
                if not radius or max(abs(v - y), abs(u - x)) <= radius
            ]
            best = sorted(pairs, key=lambda pair: -pair[0])[:topk]
            expected = sum(weight * label for weight, label in best) / sum(
                weight for weight, _ in best
            )
            assert found[y, x].tolist() == pytest.approx(expected.tolist(), abs=1e-5), (
                f"patch {y}, {x}: its topk likest within the radius vote, "
                "with weights that sum to 1"
            )


@pytest.mark.parametrize("radius", [1, 2, 3])
def test_a_patch_hears_exactly_the_patches_in_its_window(radius):
    """With every patch alike and all near ones taken, the labels' weights are uniform over the
    window, 0 outside.
    """
    rows, cols = 5, 7
    frame = torch.ones(rows, cols, 1)
    labels = torch.eye(rows * cols).view(1, rows, cols, -1)
    heard = evs.propagate(frame, frame[None], labels, topk=rows * cols, radius=radius).view(
        rows, cols, rows, cols
    )
    for y, x, v, u in np.ndindex(rows, cols, rows, cols):
        assert (heard[y, x, v, u] > 0) == (abs(y - v) <= radius and abs(x - u) <= radius), (
            f"patch {y}, {x} hears patch {v}, {u}, or should: "
            "the radius holds for rows and for columns"
        )
    torch.testing.assert_close(
        heard.sum(dim=(2, 3)), torch.ones(rows, cols), msg="a patch's weights must sum to 1"
    )


def test_each_label_is_scaled_to_its_own_strongest_patch_before_the_largest_wins():
    """The release's norm_mask: a label that is weak everywhere still wins where it is at its
    strongest.
    """
    labels = torch.tensor([[[1.0, 0.0], [0.8, 0.2]]])  # one row of two patches: ground, object
    assert evs.to_mask(labels, (1, 2)).tolist() == [[0, 1]]
    only_ground = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
    assert evs.to_mask(only_ground, (3, 5)).eq(0).all(), (
        "a label that is the same everywhere must not divide by 0"
    )


def test_a_still_video_keeps_its_mask_and_the_ids_are_kept(network):
    images, ids = make_clip(seed=3, frames=1, side=96, number=2)
    ids[ids == 2] = 254
    still = Video(
        "still", images.expand(5, -1, -1, -1), ids.expand(5, -1, -1), [str(i) for i in range(5)]
    )
    found = evs.follow(network, still, 96 * 4, ARGS, HERE)  # patches of 2 of the frame's pixels
    assert found.unique().tolist() == [0, 1, 254] and torch.equal(found[0], ids[0]), (
        "the first frame is given"
    )
    similarity = scores(found, torch.where(still.ids == 254, 2, still.ids))[0, 0]
    assert similarity > 85, f"nothing moved, and yet J is {similarity:.1f} %"


class Contents(nn.Module):
    """Features by hand: a patch of one pixel has the row of a table that its red names.

    0 is the ground, 1 ... 9 are the parts of a square; their cosines: with itself 1, ground and
    part 1/2, parts 1/4.
    """

    def get_intermediate_layers(self, pixels: torch.Tensor, n: int = 1) -> list[torch.Tensor]:
        table = torch.eye(10) * 0.75**0.5
        table[:, 0] = 0.5
        table[0, 0] = 1.0
        return [
            table[torch.cat([torch.zeros(1), pixels[0, 0].flatten()]).round().long()].unsqueeze(0)
        ]


def followed(corners: list[tuple[int, int]], radius: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks of the 3 x 3 square with these upper left corners, as followed and as they are: bool
    (T, 23, 29) twice.
    """
    codes = torch.zeros(len(corners), 23, 29, dtype=torch.uint8)
    for frame, (row, column) in zip(codes, corners):
        frame[row : row + 3, column : column + 3] = torch.arange(1, 10).view(3, 3)
    video = Video("square", codes.unsqueeze(1).expand(-1, 3, -1, -1), 5 * (codes > 0).byte(), [])
    args = {
        "patch_size": 1,
        "mean": (0, 0, 0),
        "std": (1 / 255, 1 / 255, 1 / 255),
    }  # so that pixels stay what they are
    return evs.follow(Contents(), video, 23, args, HERE, radius=radius) == 5, codes > 0


@pytest.mark.parametrize("shift", [(0, 1), (1, -2), (-3, 3)])
def test_a_shifted_square_is_followed_to_the_patch(shift):
    """At most the radius, 3, a frame, so soon out of the first frame's reach: the last frames carry
    it on.
    """
    start = (20 if shift[0] < 0 else 0, 26 if shift[1] < 0 else 0)
    found, true = followed(
        [(start[0] + t * shift[0], start[1] + t * shift[1]) for t in range(7)], radius=3
    )
    for t in range(7):
        assert torch.equal(found[t], true[t]), f"frame {t}: {found[t].nonzero().tolist()}"


@pytest.mark.parametrize("jump", [(0, 4), (4, 0), (4, 4)])
def test_a_jump_beyond_the_radius_is_not_followed(jump):
    """No patch of the square lies near its new place, so that all of it takes the ground's label,
    then and later.
    """
    corners = [(1, t) for t in range(3)] + [(1 + jump[0], 2 + jump[1] + t) for t in range(4)]
    found, true = followed(corners, radius=3)
    assert torch.equal(found[:3], true[:3]), "before the jump it is followed"
    assert not found[3:].any(), (
        f"frames and patches that are still marked: {found[3:].nonzero().tolist()}"
    )
    assert torch.equal(*followed(corners, radius=0)), "without a limit it is found again"
    assert torch.equal(*followed(corners, radius=4)), "and with a radius that reaches as far"


def test_only_the_first_frame_and_the_last_seven_vote(network, monkeypatch):
    lengths = []
    propagate = evs.propagate
    monkeypatch.setattr(
        evs,
        "propagate",
        lambda frame, context, *rest, **more: (
            lengths.append(len(context)),
            propagate(frame, context, *rest, **more),
        )[1],
    )
    images, ids = make_clip(frames=11, side=48)
    evs.follow(network, Video("clip", images, ids, []), 48, ARGS, HERE)
    assert lengths == [1, 2, 3, 4, 5, 6, 7, 8, 8, 8]


def test_davis_in_and_indexed_pngs_with_its_palette_out(weights, davis, tmp_path, capsys):
    line = run(weights, tmp_path, "--data_path", davis, "--eval_size", 64)
    means = []
    for name in ("fish", "snail"):
        truth, found = [], []
        for i in range(5):
            given = Image.open(davis / "Annotations/480p" / name / f"{i:05}.png")
            written = Image.open(tmp_path / "out" / name / f"{i:05}.png")
            assert (
                written.mode == "P"
                and written.getpalette() == given.getpalette()
                and written.size == given.size
            )
            truth.append(torch.from_numpy(np.array(given)))
            found.append(torch.from_numpy(np.array(written)))
            assert Image.open(tmp_path / "out/overlay" / name / f"{i:05}.png").size == given.size
        assert torch.equal(found[0], truth[0]), "the first frame's mask is given, and stays"
        assert set(torch.stack(found).unique().tolist()) <= {0, 1, 3}, (
            "the objects keep their numbers"
        )
        assert Image.open(tmp_path / "out/overlay" / f"{name}.gif").n_frames == 5
        means.append(scores(torch.stack(found), torch.stack(truth)))
    J, contour = torch.cat(means).mean(dim=0).tolist()
    assert line["measured"]["J-Mean %"] == pytest.approx(J, abs=1e-3)
    assert line["measured"]["J&F-Mean %"] == pytest.approx((J + contour) / 2, abs=1e-3)
    assert "2 sequences, 6 objects" in line["data"], (
        "3 is the largest number, so that 2 counts as well, as officially"
    )
    assert "J&F-Mean" in capsys.readouterr().out


def test_the_embedded_clips_run_end_to_end_and_follow_better_than_the_first_mask(
    weights, tmp_path, monkeypatch
):
    monkeypatch.setattr(evs, "CLIPS", 1)
    monkeypatch.setattr(evs, "CLIP_SIDE", 160)
    line = run(weights, tmp_path, "--overlay", "false")
    measured = line["measured"]
    assert measured["J&F-Mean %"] > measured["first mask kept, J&F-Mean %"], measured
    assert "untrained, J&F-Mean %" in measured and "short side 160 pixels" in line["data"]
    assert not (tmp_path / "out/overlay").exists() and (tmp_path / "out/clip0/00023.png").exists()


def test_a_clip_is_drawn_from_its_seed_with_creatures_that_move_over_still_ground_as_light_falls():
    images, ids = make_clip(seed=1, frames=5, side=64)
    assert (
        images.shape == (5, 3, 64, 64)
        and ids.shape == (5, 64, 64)
        and images.dtype == ids.dtype == torch.uint8
    )
    assert torch.equal(images, make_clip(seed=1, frames=5, side=64)[0])
    assert not torch.equal(images, make_clip(seed=2, frames=5, side=64)[0])
    for frame in ids:
        assert set(frame.unique().tolist()) == {0, 1, 2, 3}
    ground = (ids[0] == 0) & (ids[4] == 0)
    darkened = images[0][:, ground] * torch.tensor(DUSK).view(3, 1)
    torch.testing.assert_close(images[4][:, ground].float(), darkened, atol=1, rtol=0)
    for number in (1, 2, 3):
        overlap = region_similarity(ids[:1] == number, ids[-1:] == number).item()
        assert overlap < 0.7, (
            f"creature {number} hardly moved: J of its first and last mask is {overlap:.2f}"
        )


def as_in_2016(davis: Path) -> None:
    """Give an object the number 255 in grey masks, and take the list of sequences away."""
    (davis / "ImageSets/2017/val.txt").unlink()
    for file in (davis / "Annotations").rglob("*.png"):
        ids = np.array(Image.open(file))
        Image.fromarray(np.where(ids == 3, 255, 0).astype(np.uint8)).save(file)


def test_davis_2016_has_one_object_of_255_and_no_list(weights, davis, tmp_path):
    """As numbers 0 and 1 of DAVIS 2017; both rivals of few sequences are measured."""
    as_in_2016(davis)
    line = run(weights, tmp_path, "--data_path", davis, "--eval_size", 64)
    assert "2 sequences, 2 objects" in line["data"]
    with Image.open(tmp_path / "out/fish/00000.png") as first:
        written = np.array(first)
    with Image.open(davis / "Annotations/480p/fish/00000.png") as first:
        assert np.array_equal(written, np.array(first) == 255)
    for file in (davis / "Annotations").rglob("*.png"):
        ids = np.array(Image.open(file)) // 255
        Image.fromarray(ids.astype(np.uint8)).save(file)
    numbered = run(weights, tmp_path, "--data_path", davis, "--eval_size", 64)
    assert numbered["measured"] == line["measured"]
    assert "untrained, J&F-Mean %" in line["measured"]
    assert "first mask kept, J&F-Mean %" in line["measured"]


def test_a_plain_folder_with_masks_of_all_frames_is_measured_as_in_davis(weights, davis, tmp_path):
    """Frames are sorted by their numbers: 9.jpg before 10.jpg."""
    for part in ("JPEGImages", "Annotations"):
        for file in sorted((davis / part / "480p/fish").iterdir()):
            file.rename(file.with_name(f"{7 + int(file.stem)}{file.suffix}"))
    frames, masks = davis / "JPEGImages/480p/fish", davis / "Annotations/480p/fish"
    flags = ("--frames", frames, "--masks", masks, "--eval_size", 64)
    line = run(weights, tmp_path, *flags)
    assert "1 sequences, 3 objects" in line["data"] and line["paper"] == {}
    assert (tmp_path / "out/fish/11.png").exists()
    assert Image.open(tmp_path / "out/overlay/fish.gif").n_frames == 5
    files = davis_module.plain_files(str(frames), str(masks))
    video = davis_module.read_video("fish", files["fish"])
    assert video.frames == ["7", "8", "9", "10", "11"]


@pytest.mark.parametrize("beside", [True, False])
def test_of_a_first_mask_alone_the_others_are_written_and_nothing_is_measured(
    weights, davis, tmp_path, capsys, beside
):
    """Its file may lie among the frames; nor do some more masks make J and F."""
    frames, masks = davis / "JPEGImages/480p/fish", davis / "Annotations/480p/fish"
    files = davis_module.plain_files(str(frames), str(masks))
    whole = davis_module.read_video("fish", files["fish"])
    first = masks / "00000.png"
    if beside:
        first = first.rename(frames / "first mask.png")
    else:
        (masks / "00003.png").unlink()
        first = masks
    flags = ("--frames", frames, "--masks", first, "--eval_size", 64)
    evs.main([
        str(flag)
        for flag in (
            "--pretrained_weights", weights, "--output_dir", tmp_path / "out", "--device", "cpu",
            "--results", tmp_path / "results.jsonl", *flags,
        )
    ])
    assert "no J and F" in capsys.readouterr().out
    assert not (tmp_path / "results.jsonl").exists()
    written = sorted((tmp_path / "out/fish").iterdir())
    assert [file.name for file in written] == [f"{i:05}.png" for i in range(5)]
    assert np.array_equal(np.array(Image.open(written[0])), whole.ids[0])


def test_a_plain_folder_without_the_first_mask_is_an_error(weights, davis, capsys):
    frames, masks = davis / "JPEGImages/480p/fish", davis / "Annotations/480p/fish"
    (masks / "00000.png").unlink()
    said = error_of(
        capsys, "--pretrained_weights", weights, "--frames", frames, "--masks", masks,
        "--device", "cpu",
    )
    assert "has no mask of the first frame, '00000.jpg'" in said


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def test_masks_are_never_written_over_frames_or_masks(weights, davis, tmp_path, capsys):
    """By a relative path, by a link, and in DAVIS's layout: nothing is written at all."""
    frames, masks = davis / "JPEGImages/480p/fish", davis / "Annotations/480p/fish"
    clip = tmp_path / "clip"
    clip.mkdir()
    for file in frames.iterdir():
        Image.open(file).save(clip / f"{file.stem}.png")
    shutil.copy(masks / "00000.png", tmp_path / "first.png")
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "overlay").mkdir()
    shutil.copytree(clip, tmp_path / "overlay/clip")
    first = ("--masks", tmp_path / "first.png")
    before = contents(tmp_path)
    for flags in (
        ("--frames", clip, *first, "--output_dir", tmp_path),
        ("--frames", clip, *first, "--output_dir", tmp_path / "out/../link"),
        ("--frames", tmp_path / "overlay/clip", *first, "--output_dir", tmp_path),
        ("--data_path", davis, "--output_dir", davis / "Annotations/480p"),
    ):
        said = error_of(
            capsys, "--pretrained_weights", weights, "--device", "cpu", "--eval_size", 64, *flags
        )
        assert "--output_dir" in said and "holds frames or masks" in said
        assert contents(tmp_path) == before


def test_one_folder_of_frames_and_masks_is_refused(weights, davis, tmp_path, capsys):
    """Masks are not read as frames, nor is one of two files of a name taken by chance."""
    frames, masks = davis / "JPEGImages/480p/fish", davis / "Annotations/480p/fish"

    def said(frames: Path, masks: Path) -> str:
        return error_of(
            capsys, "--pretrained_weights", weights, "--frames", frames, "--masks", masks,
            "--device", "cpu", "--output_dir", tmp_path / "out",
        )

    both = tmp_path / "both"
    shutil.copytree(frames, both)
    for file in masks.iterdir():
        shutil.copy(file, both / f"mask{file.name}")
    assert "a folder of their own" in said(both, both)
    assert "a folder of their own" in said(both, tmp_path / "out/../both")

    Image.open(frames / "00001.jpg").save(frames / "00001.png")
    assert "has both '00001.jpg' and '00001.png'" in said(frames, masks)
    (frames / "00001.png").unlink()
    Image.open(masks / "00003.png").save(masks / "00003.tif")
    assert "has both '00003.png' and '00003.tif'" in said(frames, masks)


def test_a_first_mask_beside_the_frames_is_no_frame_however_its_path_is_written(davis, monkeypatch):
    frames = davis / "JPEGImages/480p/fish"
    (davis / "Annotations/480p/fish/00000.png").rename(frames / "00000.png")
    monkeypatch.chdir(davis)
    files = davis_module.plain_files(str(frames), "JPEGImages/480p/fish/00000.png")["fish"]
    assert [frame.name for frame, _ in files] == [f"{i:05}.jpg" for i in range(5)]
    assert files[0][1].name == "00000.png"


def test_frames_of_16_bits_share_one_black_and_white(weights, davis, tmp_path, monkeypatch, capsys):
    """The same number is the same grey in all frames, whatever else a frame holds."""
    frames, masks = tmp_path / "deep", davis / "Annotations/480p/fish"
    frames.mkdir()
    rng = np.random.default_rng(0)
    for i, highest in enumerate((60000, 700, 5000, 20000, 300)):
        pixels = rng.integers(0, highest, (50, 70)).astype(np.uint16)
        pixels[:, :10] = 16384
        Image.fromarray(pixels).save(frames / f"{i:05}.png")
    seen = []
    monkeypatch.setattr(evs, "write_masks", lambda output, video, ids: seen.append(video.images))
    flags = ("--frames", frames, "--masks", masks, "--eval_size", 64, "--overlay", "false")
    run(weights, tmp_path, *flags)
    assert seen[-1][:, :, :, :10].unique().tolist() == [64]
    assert "--levels 0 65535 are black and white" in capsys.readouterr().out
    run(weights, tmp_path, *flags, "--levels", 0, 32768)
    assert seen[-1][:, :, :, :10].unique().tolist() == [128]


def spoil(davis: Path, what: str) -> None:
    annotation, frame = (
        davis / "Annotations/480p/fish/00002.png",
        davis / "JPEGImages/480p/fish/00002.jpg",
    )
    match what:
        case "no list and no frames":
            shutil.rmtree(davis / "ImageSets")
            shutil.rmtree(davis / "JPEGImages")
        case "empty list":
            (davis / "ImageSets/2017/val.txt").write_text("\n \n")
        case "sequence elsewhere":
            (davis / "ImageSets/2017/val.txt").write_text("../480p/fish\n")
        case "unknown sequence":
            (davis / "ImageSets/2017/val.txt").write_text("whale\n")
        case "missing annotation":
            annotation.unlink()
        case "torn annotation":
            annotation.write_bytes(annotation.read_bytes()[:60])
        case "colours":
            Image.new("RGB", (70, 50), "red").save(annotation)
        case "frame's size":
            Image.new("RGB", (70, 51)).save(frame)
        case "annotation's size":
            Image.new("P", (71, 50)).save(annotation)
        case "no object":
            Image.new("L", (70, 50), 255).save(annotation.with_name("00000.png"))


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("no list and no frames", "JPEGImages/480p"),
        ("empty list", "names no sequence"),
        ("unknown sequence", "whale' has 0 frames"),
        ("sequence elsewhere", "'../480p/fish', which is no folder's own name"),
        ("missing annotation", "fish/00002.png"),
        ("torn annotation", "fish/00002.png"),
        ("colours", "RGB colours"),
        ("frame's size", "fish/00002.jpg' is 70 x 51"),
        ("annotation's size", "fish/00002.png' is 71 x 50"),
        ("no object", "marks no object"),
    ],
)
def test_bad_files_are_named_with_the_fix(weights, davis, capsys, what, said):
    spoil(davis, what)
    assert said in error_of(
        capsys, "--pretrained_weights", weights, "--data_path", davis, "--device", "cpu"
    )


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--temperature inf", "--temperature inf must be finite"),
        ("--topk 0", "--topk 0"),
        ("--temperature 0", "--temperature 0.0"),
        ("--n_last_frames -1", "--n_last_frames -1"),
        ("--size_mask_neighborhood -1", "--size_mask_neighborhood -1"),
        ("--eval_size -8", "--eval_size -8"),
        ("--frames clip", "--frames and --masks go together"),
        ("--frames clip --masks mask.png --data_path davis", "leave --data_path out"),
        ("--frames nowhere --masks mask.png", "has 0 images"),
        ("--dataset cifar10", "unrecognized arguments: --dataset"),
        ("--data_path nowhere", "nowhere/JPEGImages"),
    ],
)
def test_bad_flags_are_named(weights, capsys, flags, said):
    assert said in error_of(
        capsys, "--pretrained_weights", weights, *flags.split(), "--device", "cpu"
    )


def test_a_convnet_has_no_patches_to_match(tmp_path, capsys):
    torch.save(build_backbone("resnet18").state_dict(), tmp_path / "resnet.pth")
    said = error_of(
        capsys,
        "--pretrained_weights",
        tmp_path / "resnet.pth",
        "--arch",
        "resnet18",
        "--device",
        "cpu",
    )
    assert "take a ViT's weights" in said
