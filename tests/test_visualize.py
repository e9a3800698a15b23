"""The attention figure and the film, from a checkpoint and images of any shape to files."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import visualize_attention
from attention import cls_attention, keep_mass
from data import decode
from evals import attention_film
from evals.attention_film import film_frames
from features import mean_and_std, normalise
from runtime import panels
from runtime.principal import PrincipalColours
from runtime.query import cosines, query_patches
from training.backbone import build_backbone
from training.evaluation import fit_to_patches
from vit import VisionTransformer


def principal_colours(images: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return the colours of each image's tokens, after all of them were seen."""
    colours = PrincipalColours()
    for tokens in images:
        colours.add(tokens)
    return [colours.of(tokens) for tokens in images]


@pytest.fixture
def weights(tmp_path) -> Path:
    torch.manual_seed(0)
    torch.save(
        build_backbone("vit_nano", 8, 48, init_std=0.2).state_dict(), tmp_path / "weights.pth"
    )
    return tmp_path / "weights.pth"


def photo(path: Path, size: tuple[int, int]) -> str:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)).save(
        path
    )
    return str(path)


def test_one_image_gives_the_figure_and_the_releases_files(weights, tmp_path, capsys):
    image = photo(tmp_path / "wide.png", (50, 170))
    visualize_attention.main(
        [
            "--pretrained_weights",
            str(weights),
            "--image_path",
            image,
            "--image_size",
            "40",
            "--threshold",
            "0.6",
            "--output_dir",
            str(tmp_path / "out"),
            "--device",
            "cpu",
        ]
    )
    assert str(tmp_path / "out" / "attention.png") in capsys.readouterr().out
    parts = ["mean", *(f"head{j}" for j in range(4))]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        ".attention",
        "attention.png",
        "img.png",
        "mask_th0.6_heads.png",
        *(
            f"{kind}{part}.png"
            for part in parts
            for kind in ("attn-", "mask_th0.6_", "binary_th0.6_")
        ),
    }
    assert Image.open(tmp_path / "out" / "img.png").size == (136, 40), (
        "the shape must be kept, in multiples of 8"
    )


def test_several_images_of_different_shapes_share_one_figure(weights, tmp_path):
    images = [photo(tmp_path / f"{i}.png", size) for i, size in enumerate([(30, 60), (60, 30)])]
    visualize_attention.main(
        [
            "--pretrained_weights",
            str(weights),
            "--image_path",
            *images,
            "--image_size",
            "32",
            "--output_dir",
            str(tmp_path / "out"),
            "--device",
            "cpu",
        ]
    )
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {".attention", "attention.png", "0-0", "1-1"}
    both = Image.open(tmp_path / "out" / "attention.png")
    alone = [Image.open(tmp_path / "out" / name / "attention.png") for name in ("0-0", "1-1")]
    assert both.size == (alone[0].width, alone[0].height + alone[1].height)


def draw(weights: Path, output: Path, *flags: str) -> None:
    common = ["--pretrained_weights", str(weights), "--device", "cpu", "--output_dir", str(output)]
    visualize_attention.main([*common, *flags])


def test_a_folder_is_drawn_without_its_unreadable_files_which_are_counted(
    weights, tmp_path, capsys
):
    folder = tmp_path / "photos"
    (folder / "below").mkdir(parents=True)
    photo(folder / "a.png", (31, 37))
    photo(folder / "below" / "c.png", (37, 31))
    (folder / "b.jpg").write_text("no image")
    lost = str(tmp_path / "lost.png")
    draw(weights, tmp_path / "out", "--image_path", str(folder), lost, "--image_size", "32")
    said = capsys.readouterr()
    assert "2 of 4 drawn, 2 skipped" in said.out
    for name in ("b.jpg", "lost.png"):
        assert name in said.err and "b.jpg" in said.err
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {".attention", "attention.png", "0-a", "2-c"}


@pytest.mark.parametrize("what", ["empty folder", "bad files"])
def test_nothing_to_draw_gets_one_line(weights, tmp_path, capsys, what):
    folder = tmp_path / "photos"
    folder.mkdir()
    if what == "bad files":
        (folder / "a.jpg").write_text("no image")
        (folder / "b.jpg").write_text("no image")
    with pytest.raises(SystemExit) as stopped:
        draw(weights, tmp_path / "out", "--image_path", str(folder))
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert stopped.value.code == 2 and said.startswith("error: "), said
    assert ("no images" if what == "empty folder" else "none of the 2 files") in said


def test_the_binary_mask_has_the_images_own_size_and_the_masks_patches(weights, tmp_path):
    """Each pixel of 53 x 97 is 255 exactly where the patch that it falls in is kept."""
    image = photo(tmp_path / "photo.png", (53, 97))
    out = tmp_path / "out"
    draw(weights, out, "--image_path", image, "--image_size", "40", "--threshold", "0.6")
    with Image.open(out / "binary_th0.6_head2.png") as file:
        assert file.mode == "L" and file.size == (97, 53)
        mask = np.array(file)
    assert set(np.unique(mask)) == {0, 255}

    backbone = build_backbone("vit_nano", 8, 48).eval()
    backbone.load_state_dict(torch.load(weights, weights_only=True))
    seen = normalise(fit_to_patches(decode(image), 40, 8), *mean_and_std({})).unsqueeze(0)
    kept = keep_mass(cls_attention(backbone, seen)[0, 2], 0.6)
    rows, columns = kept.shape
    for y in range(53):
        for x in range(97):
            assert (mask[y, x] == 255) == kept[y * rows // 53, x * columns // 97]


class Largest(TorchDispatchMode):
    """Remembers how many numbers the largest tensor has that any operation returns."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        result = operation(*arguments, **(options or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return result


def test_drawing_never_builds_the_attention_of_all_patches_to_all():
    """With 40 x 48 patches and D = 12 the MLP's 4 N D numbers are the most; N x N are 40 as many.
    """
    N = 40 * 48
    backbone = VisionTransformer(8, 64, embed_dim=12, depth=2, num_heads=3).eval()
    image = torch.zeros(3, 320, 384, dtype=torch.uint8)
    with Largest() as largest:
        visualize_attention.attention_of(backbone, image, {})
        visualize_attention.patch_tokens_of(backbone, image, {})
        visualize_attention.query_attention_of(backbone, image, {}, [(0, 0), (39, 47)])
    assert largest.numbers <= 3 * 320 * 384
    with torch.no_grad(), Largest() as largest:  # the measure sees it where it is wanted
        backbone.get_last_selfattention(torch.zeros(1, 3, 320, 384))
    assert largest.numbers == 3 * (1 + N) ** 2


SHORT_OF_MEMORY = """
import resource, sys
import torch
from visualize_attention import main

size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 2**28, size + 2**28))
main(sys.argv[1:])
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="only Linux tells the memory")
def test_too_little_memory_gets_one_line(weights, tmp_path):
    """256 MiB more than the imports take are too few for 4000 x 4000 pixels."""
    image = photo(tmp_path / "photo.png", (64, 64))
    flags = ["--pretrained_weights", weights, "--image_path", image, "--image_size", "4000"]
    flags += ["--device", "cpu", "--output_dir", tmp_path / "out"]
    done = subprocess.run(
        [sys.executable, "-c", SHORT_OF_MEMORY, *flags],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: too little memory for an image of 4000 x 4000 pixels")
    assert "--image_size" in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


def test_the_mask_file_shows_the_patches_that_hold_the_mass(weights, tmp_path):
    """The darkened pixels of the written mask are those that keep_mass leaves out."""
    white = tmp_path / "white.png"
    Image.fromarray(np.full((48, 64, 3), 255, dtype=np.uint8)).save(white)
    visualize_attention.main(
        [
            "--pretrained_weights",
            str(weights),
            "--image_path",
            str(white),
            "--image_size",
            "48",
            "--threshold",
            "0.6",
            "--output_dir",
            str(tmp_path / "out"),
            "--device",
            "cpu",
        ]
    )
    backbone = build_backbone("vit_nano", 8, 48).eval()
    backbone.load_state_dict(torch.load(weights, weights_only=True))
    seen = normalise(torch.full((3, 48, 64), 255, dtype=torch.uint8), *mean_and_std({})).unsqueeze(
        0
    )
    kept = keep_mass(cls_attention(backbone, seen)[0, 1], 0.6)
    shown = decode(tmp_path / "out" / "mask_th0.6_head1.png")[0, 4::8, 4::8] > 128
    assert torch.equal(shown, kept)


def test_principal_colours_are_the_leading_singular_vectors_of_all_images_together():
    """z against the singular value decomposition in float64; each colour is 1/2 + z / 4 standard
    deviations.
    """
    generator = torch.Generator().manual_seed(0)
    spread = torch.tensor([9.0, 5.0, 3.0, 1.0, 1.0, 1.0, 1.0])
    tokens = [torch.randn(*grid, 7, generator=generator) * spread for grid in ((11, 13), (5, 17))]
    flat = torch.cat([one.flatten(0, 1) for one in tokens]).double()
    z = torch.linalg.svd(flat - flat.mean(dim=0), full_matrices=False)
    z = z.U[:, :3] * z.S[:3]
    expected = 0.5 + z / (4 * z.std(dim=0, correction=0))
    colours = torch.cat([one.flatten(0, 1) for one in principal_colours(tokens)]).double()
    for channel, name in enumerate(("red", "green", "blue")):
        ways = [
            (colours[:, channel] - value.clamp(0, 1)).abs().max()
            for value in (expected[:, channel], 1 - expected[:, channel])
        ]
        assert min(ways) < 1e-5, f"{name} must be component {channel + 1}, up to its sign"
    assert [one.shape for one in principal_colours(tokens)] == [(11, 13, 3), (5, 17, 3)]


def test_the_colours_of_equal_tokens_are_grey_and_do_not_depend_on_a_shift():
    for grid in ((3, 5), (1, 1)):
        assert torch.equal(
            principal_colours([torch.ones(*grid, 7)])[0], torch.full((*grid, 3), 0.5)
        )
    tokens = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(principal_colours([tokens]), principal_colours([tokens + 3.0]))


def test_pca_colours_patches_that_are_alike_alike_in_all_images(weights, tmp_path):
    """Two images that are one image have one colour map; the map has the patches' grid."""
    one, other = photo(tmp_path / "one.png", (48, 64)), photo(tmp_path / "other.png", (48, 64))
    visualize_attention.main(
        [
            "--pretrained_weights",
            str(weights),
            "--image_path",
            one,
            other,
            "--image_size",
            "48",
            "--pca",
            "--output_dir",
            str(tmp_path / "out"),
            "--device",
            "cpu",
        ]
    )
    first, second = (
        decode(tmp_path / "out" / folder / "pca.png") for folder in ("0-one", "1-other")
    )
    assert torch.equal(first, second)
    assert torch.equal(
        first, first[:, ::8, ::8].repeat_interleave(8, dim=1).repeat_interleave(8, dim=2)
    )


def test_each_patch_has_the_colour_of_the_head_that_keeps_it():
    """Heads 0 and 1 keep patch (0, 0), which has more of head 1's mass; head 1 keeps (1, 2) too.

    Patches that none keeps are dark.
    """
    attention = torch.tensor(
        [[[0.30, 0.01, 0.01], [0.25, 0.01, 0.02]], [[0.10, 0.0, 0.0], [0.0, 0.0, 0.05]]]
    )
    kept = torch.zeros(2, 2, 3, dtype=torch.bool)
    kept[0, 0, 0] = kept[0, 1, 0] = kept[1, 0, 0] = kept[1, 1, 2] = True
    pixels = torch.rand(10, 15, 3, generator=torch.Generator().manual_seed(0))
    painted = visualize_attention.paint_heads(pixels, attention, kept, 5)
    colours = panels.head_colours(2)
    owners = [[1, None, None], [0, None, 1]]
    for y in range(10):
        for x in range(15):
            owner = owners[y // 5][x // 5]
            expected = pixels[y, x] / 4
            if owner is not None:
                expected = 0.4 * pixels[y, x].mean() + 0.6 * colours[owner]
            torch.testing.assert_close(painted[y, x], expected)


@pytest.mark.parametrize("heads", [1, 2, 6, 12, 23])
def test_no_two_heads_share_a_colour(heads):
    colours = panels.head_colours(heads)
    assert colours.shape == (heads, 3) and len(colours.unique(dim=0)) == heads


def test_cosines_are_those_of_a_loop():
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(3, 7, generator=generator)
    tokens = torch.randn(2, 5, 7, generator=generator)
    found = cosines(queries, tokens)
    for query in range(3):
        for row in range(2):
            for column in range(5):
                a, b = queries[query].double(), tokens[row, column].double()
                cosine = (a @ b / (a @ a).sqrt() / (b @ b).sqrt()).item()
                assert found[query, row, column].item() == pytest.approx(cosine, abs=1e-6)


@pytest.mark.parametrize(
    ("point", "patch"),
    [((0, 0), (0, 0)), ((1, 1), (4, 10)), ((0.5, 0.19), (0, 5)), ((0.1, 0.21), (1, 1))],
)
def test_a_point_lies_in_the_patch_of_its_fractions(point, patch):
    """x of the width, y of the height; the borders belong to the image."""
    assert query_patches(point, rows=5, columns=11) == [patch]


def test_a_query_gives_a_row_a_point_and_its_files_beside_the_images(weights, tmp_path, capsys):
    images = [photo(tmp_path / f"{i}.png", size) for i, size in enumerate([(32, 48), (48, 32)])]
    out = tmp_path / "out"
    flags = ["--image_size", "32", "--query", "0.1", "0.9", "1", "0"]
    draw(weights, out, "--image_path", *images, *flags)
    assert str(out / "query.png") in capsys.readouterr().out
    names = {path.name for path in out.iterdir()}
    assert names == {".attention", "attention.png", "query.png", "0-0", "1-1"}
    maps = [f"attn-{name}" for name in ("mean", "head0", "head1", "head2", "head3")]
    for folder, parts in (("0-0", ["img", "cosine", *maps]), ("1-1", ["cosine"])):
        files = {path.name for path in (out / folder).glob("query*")}
        assert files == {f"query{query}_{part}.png" for query in (0, 1) for part in parts}
    with Image.open(out / "query.png") as figure:
        assert figure.width == 4 * 220, "the image, its attention, and two maps of cosines"


def test_a_querys_files_show_the_row_of_its_patch(weights, tmp_path):
    """query0_attn-head2.png is head 2's row of patch (3, 1), and query0_cosine.png its cosines."""
    image = photo(tmp_path / "photo.png", (40, 56))
    out = tmp_path / "out"
    flags = ["--image_size", "40", "--query", "0.2", "0.7"]
    draw(weights, out, "--image_path", image, *flags)

    backbone = build_backbone("vit_nano", 8, 48).eval()
    backbone.load_state_dict(torch.load(weights, weights_only=True))
    seen = normalise(decode(image), *mean_and_std({})).unsqueeze(0)
    token = 1 + 3 * 7 + 1
    with torch.no_grad():
        attention = backbone.get_last_selfattention(seen)[0, 2, token, 1:].view(5, 7)
        features = backbone.get_intermediate_layers(seen, 1)[0][0]
    similar = torch.cosine_similarity(features[1:], features[token], dim=1).view(5, 7)

    pixels = decode(image).movedim(0, -1).float() / 255
    for name, values, most in (
        ("attn-head2", attention, attention.max()), ("cosine", similar, 1.0)
    ):
        expected = panels.lay_over(pixels, values, values.min(), most, 8)
        expected = panels.frame_patch(expected, 3, 1, 8)
        drawn = decode(out / f"query0_{name}.png").movedim(0, -1).float() / 255
        torch.testing.assert_close(drawn, expected, atol=0.02, rtol=0)


def test_a_frame_leaves_its_patch_and_all_beyond_as_they_are():
    pixels = torch.rand(120, 160, 3, generator=torch.Generator().manual_seed(0)) / 2
    for row, column in ((3, 5), (0, 0), (14, 19)):
        framed = panels.frame_patch(pixels, row, column, 8)
        top, left = 8 * row, 8 * column
        for y in range(120):
            for x in range(160):
                inside = top <= y < top + 8 and left <= x < left + 8
                near = top - 2 <= y < top + 10 and left - 2 <= x < left + 10
                expected = pixels[y, x]
                if near and not inside:
                    expected = panels.RED
                assert torch.equal(framed[y, x], expected)


def test_the_same_object_is_found_in_another_image(tmp_path):
    """Without positions and with empty branches a patch's feature is its own pixels' alone."""
    backbone = build_backbone("vit_nano", 8, 48, init_std=0.2)
    torch.nn.init.zeros_(backbone.pos_embed)
    for block in backbone.blocks:
        torch.nn.init.zeros_(block.attn.proj.weight)
        torch.nn.init.zeros_(block.mlp.fc2.weight)
    torch.save(backbone.state_dict(), tmp_path / "weights.pth")
    generator = np.random.default_rng(0)
    object_pixels = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    for name, size, row, column in (("a", (40, 56), 1, 5), ("b", (48, 40), 4, 2)):
        image = np.full((*size, 3), 128, dtype=np.uint8)
        image[8 * row:8 * row + 8, 8 * column:8 * column + 8] = object_pixels
        Image.fromarray(image).save(tmp_path / f"{name}.png")
    images = [str(tmp_path / "a.png"), str(tmp_path / "b.png")]
    query = ["--query", str(5.5 / 7), str(1.5 / 5)]
    draw(tmp_path / "weights.pth", tmp_path / "out", "--image_path", *images, "--image_size",
         "40", *query)
    shown = decode(tmp_path / "out" / "1-b" / "query0_cosine.png").float()
    yellow = (shown[0] - shown[2]).unfold(0, 8, 8).unfold(1, 8, 8).mean(dim=(2, 3))
    assert divmod(yellow.argmax().item(), 5) == (4, 2)
    ground = yellow[yellow < yellow.max()]
    assert len(ground) == 6 * 5 - 1 and (ground < 0).all(), "only the object is yellow"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--query 0.4", "1 numbers"),
        ("--query 0.4 0.6 0.1", "3 numbers"),
        ("--query 120 80", "--query 120 must be a fraction"),
        ("--query 0.4 -0.1", "--query -0.1 must be a fraction"),
        ("--query nan 0.1", "--query nan must be a fraction"),
        ("--query 0.4,0.6", "--query"),
        ("--query", "--query"),
    ],
)
def test_a_query_that_is_no_point_gets_one_line(weights, tmp_path, capsys, flags, said):
    image = photo(tmp_path / "photo.png", (32, 32))
    with pytest.raises(SystemExit) as stopped:
        draw(weights, tmp_path / "out", "--image_path", image, *flags.split())
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert stopped.value.code == 2 and said in line, line
    assert not (tmp_path / "out").exists()


def test_a_query_in_an_image_that_cannot_be_read_gets_one_line(weights, tmp_path, capsys):
    """The others are not drawn: the query would be another image's."""
    (tmp_path / "torn.png").write_text("no image")
    image = photo(tmp_path / "photo.png", (32, 32))
    paths = ["--image_path", str(tmp_path / "torn.png"), image]
    with pytest.raises(SystemExit) as stopped:
        draw(weights, tmp_path / "out", *paths, "--query", "0.4", "0.6")
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and "--query is a point of the first image" in said, said


def test_a_resnet_has_no_patch_to_ask(tmp_path, capsys):
    torch.save(build_backbone("resnet18", 8, 48).state_dict(), tmp_path / "resnet.pth")
    image = photo(tmp_path / "photo.png", (32, 32))
    flags = ["--arch", "resnet18", "--image_path", image, "--query", "0.4", "0.6"]
    with pytest.raises(SystemExit) as stopped:
        draw(tmp_path / "resnet.pth", tmp_path / "out", *flags)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and "no attention to draw" in said, said


def files_below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_an_earlier_calls_files_do_not_stay_and_other_files_do(weights, tmp_path):
    """Also those that are named as ours are: only what a call wrote is removed."""
    one, other = photo(tmp_path / "one.png", (32, 40)), photo(tmp_path / "other.png", (40, 32))
    out = tmp_path / "out"
    users = {
        "notes.txt",
        "query_of_mine.png",
        "mask_th0.8_head0.png",
        "2023-zoo/pca.png",
        "2024-05-holiday/img.png",
        "1-other/binary_th0.6_mine.png",
    }
    for name in users:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("mine")
    size = ["--image_size", "32"]
    more = ["--threshold", "0.6", "--pca", "--query", "0.4", "0.6"]
    maps = {f"attn-{name}.png" for name in ("mean", "head0", "head1", "head2", "head3")}
    drawn = {".attention", "attention.png", "img.png", *maps}

    draw(weights, out, "--image_path", one, other, *size, *more)
    assert (out / "0-one" / "query0_cosine.png").exists()
    draw(weights, out, "--image_path", one, *size, *more)
    assert (out / "mask_th0.6_head3.png").exists() and not (out / "0-one").exists()
    draw(weights, out, "--image_path", one, *size)
    assert files_below(out) == drawn | users
    for name in users:
        assert (out / name).read_text() == "mine"


@pytest.mark.parametrize("name", ["img.png", "attn-head3.png", "attention.png"])
def test_a_users_file_in_the_output_folder_is_not_overwritten(weights, tmp_path, capsys, name):
    image = photo(tmp_path / "photo.png", (32, 40))
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("mine")
    with pytest.raises(SystemExit) as stopped:
        draw(weights, out, "--image_path", image, "--image_size", "32")
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert stopped.value.code == 2 and name in said and "--output_dir" in said, said
    assert (out / name).read_text() == "mine"


def test_an_earlier_calls_file_as_input_stays(weights, tmp_path, capsys):
    image = photo(tmp_path / "photo.png", (32, 40))
    out = tmp_path / "out"
    draw(weights, out, "--image_path", image, "--image_size", "32", "--threshold", "0.6")
    before = files_below(out)
    with pytest.raises(SystemExit) as stopped:
        draw(weights, out, "--image_path", str(out / "mask_th0.6_mean.png"))
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and "mask_th0.6_mean.png" in said and "--output_dir" in said
    assert files_below(out) == before


@pytest.mark.parametrize("name", ["two\nlines.png", "\r.png", "\udcff.png", "a b\x85.png"])
def test_files_of_an_image_of_any_name_are_found_again(weights, tmp_path, name):
    one, other = photo(tmp_path / name, (32, 40)), photo(tmp_path / "other.png", (40, 32))
    out = tmp_path / "out"
    for _ in range(2):
        draw(weights, out, "--image_path", one, other, "--image_size", "32")
    draw(weights, out, "--image_path", other, "--image_size", "32")
    assert not [path for path in out.iterdir() if path.is_dir()]


def test_a_call_that_draws_nothing_leaves_an_earlier_calls_files(weights, tmp_path):
    out = tmp_path / "out"
    draw(weights, out, "--image_path", photo(tmp_path / "a.png", (32, 40)), "--image_size", "32")
    before = {path.name for path in out.iterdir()}
    (tmp_path / "torn.png").write_text("no image")
    with pytest.raises(SystemExit):
        draw(weights, out, "--image_path", str(tmp_path / "torn.png"))
    assert {path.name for path in out.iterdir()} == before


@pytest.mark.parametrize("name", ["img.png", "attn-head0.png", "attention.png"])
def test_an_image_is_not_overwritten_by_what_is_drawn_of_it(weights, tmp_path, capsys, name):
    path = tmp_path / name
    photo(path, (50, 70))
    before = path.read_bytes()
    with pytest.raises(SystemExit) as stopped:
        draw(weights, tmp_path, "--image_path", str(path), "--image_size", "32")
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and name in said and "--output_dir" in said, said
    assert path.read_bytes() == before


def test_a_films_frames_are_not_overwritten_by_what_is_drawn_of_them(weights, tmp_path, capsys):
    (tmp_path / "img").mkdir()
    for number, frame in enumerate(frames_of(48, 2)):
        frame.save(tmp_path / "img" / f"0000{number}.png")
    before = (tmp_path / "img" / "00000.png").read_bytes()
    flags = ["--pretrained_weights", str(weights), "--video", str(tmp_path / "img")]
    with pytest.raises(SystemExit) as stopped:
        attention_film.main([*flags, "--output_dir", str(tmp_path), "--device", "cpu"])
    assert stopped.value.code == 2 and "--output_dir" in capsys.readouterr().err
    assert (tmp_path / "img" / "00000.png").read_bytes() == before


def frames_of(side: int, count: int) -> list[Image.Image]:
    """A white square that steps to the right, a patch a frame."""
    frames = np.zeros((count, side, 2 * side, 3), dtype=np.uint8)
    for number in range(count):
        frames[number, 8:24, 8 * number : 8 * number + 16] = 255
    return [Image.fromarray(frame) for frame in frames]


def test_a_film_is_looked_at_frame_by_frame_in_the_order_of_the_numbers(
    weights, tmp_path, monkeypatch
):
    """Frame 10 comes after frame 9, and each frame's maps are those of the same image alone."""
    folder, frames = tmp_path / "frames", frames_of(48, 3)
    folder.mkdir()
    for number, frame in zip((2, 9, 10), frames):
        frame.save(folder / f"f{number}.png")
    monkeypatch.setenv("PATH", "")  # no ffmpeg: a GIF
    common = ["--pretrained_weights", str(weights), "--image_size", "48", "--device", "cpu"]
    attention_film.main([*common, "--video", str(folder), "--output_dir", str(tmp_path / "film")])
    visualize_attention.main(
        [*common, "--image_path", str(folder / "f10.png"), "--output_dir", str(tmp_path / "one")]
    )
    for part in ("img", "attn-mean", "attn-head3"):
        assert sorted(path.name for path in (tmp_path / "film" / part).iterdir()) == [
            f"0000{i}.png" for i in range(3)
        ]
        assert torch.equal(
            decode(tmp_path / "film" / part / "00002.png"), decode(tmp_path / "one" / f"{part}.png")
        )
    with Image.open(tmp_path / "film" / "attention.gif") as film:
        assert film.n_frames == 3, "the animation must hold every frame"


def test_an_animated_image_gives_its_frames(tmp_path):
    first, *others = frames_of(32, 5)
    first.save(tmp_path / "film.webp", save_all=True, append_images=others, lossless=True)
    for read, drawn in zip(film_frames(tmp_path / "film.webp"), [first, *others], strict=True):
        assert np.array_equal(read.movedim(0, -1), drawn), (
            "each frame must be the one that was drawn"
        )


@pytest.mark.skipif(not shutil.which("ffmpeg"), reason="ffmpeg is not installed")
@pytest.mark.parametrize("pixels", ["yuv420p", "yuv420p10le"])  # 10 bits, as telephones take them
def test_a_video_file_gives_its_frames_and_an_mp4(weights, tmp_path, pixels):
    for number, frame in enumerate(frames_of(48, 3)):
        frame.save(tmp_path / f"{number}.png")
    film = tmp_path / "-film.mkv"
    subprocess.run(
        [
            "ffmpeg",
            "-v",
            "error",
            "-i",
            tmp_path / "%d.png",
            "-c:v",
            "ffv1",
            "-pix_fmt",
            pixels,
            film,
        ],
        check=True,
    )
    for read, drawn in zip(film_frames(film), frames_of(48, 3), strict=True):
        assert (read.movedim(0, -1) - torch.from_numpy(np.array(drawn)).float()).abs().max() < 16
    attention_film.main(
        [
            "--pretrained_weights",
            str(weights),
            "--video",
            str(film),
            "--image_size",
            "48",
            "--output_dir",
            str(tmp_path / "out"),
            "--device",
            "cpu",
        ]
    )
    assert len(list(film_frames(tmp_path / "out" / "attention.mp4"))) == 3


def test_frames_of_a_longer_film_before_do_not_stay_and_other_files_do(
    weights, tmp_path, monkeypatch
):
    """Nor do the masks of another threshold. A figure of an image stays too."""
    monkeypatch.setenv("PATH", "")
    out = tmp_path / "out"
    size = ["--image_size", "48"]
    draw(weights, out, "--image_path", photo(tmp_path / "photo.png", (48, 48)), *size)
    images_files = files_below(out)
    users = {"seq2/img/00077.png", "attn-head0/00077.png", "attention-of-mine.gif"}
    for name in users:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("mine")
    common = ["--pretrained_weights", str(weights), "--device", "cpu", "--output_dir", str(out)]
    for count, threshold in ((3, "0.6"), (2, "0.8")):
        first, *others = frames_of(48, count)
        first.save(tmp_path / "film.gif", save_all=True, append_images=others)
        flags = ["--video", str(tmp_path / "film.gif"), "--threshold", threshold]
        attention_film.main([*common, *size, *flags])
    names = {path.name for path in (out / "attn-head0").iterdir()}
    assert names == {"00000.png", "00001.png", "00077.png"}
    assert (out / "mask_th0.8_head0").exists()
    assert not list(out.glob("*_th0.6_*"))
    assert images_files | users <= files_below(out)


@pytest.mark.parametrize("name", ["img/00001.png", "attention.gif"])
def test_a_film_does_not_overwrite_a_users_file(weights, tmp_path, monkeypatch, capsys, name):
    monkeypatch.setenv("PATH", "")
    first, *others = frames_of(48, 2)
    first.save(tmp_path / "film.gif", save_all=True, append_images=others)
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    flags = ["--pretrained_weights", str(weights), "--video", str(tmp_path / "film.gif")]
    flags += ["--output_dir", str(tmp_path / "out"), "--image_size", "48", "--device", "cpu"]
    with pytest.raises(SystemExit) as stopped:
        attention_film.main(flags)
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert stopped.value.code == 2 and name in said and "--output_dir" in said, said
    assert path.read_text() == "mine"


@pytest.mark.parametrize(
    "name, text, fix",
    [
        ("lost.mp4", None, "check the path"),
        ("empty", "folder", "folder of frames"),
        ("torn.gif", "GIF89a", "fix it"),
        ("torn.mp4", "no film", "folder of frames"),
    ],
)
def test_what_is_no_film_gets_one_line(weights, tmp_path, capsys, name, text, fix):
    path = tmp_path / name
    if text == "folder":
        path.mkdir()
    elif text:
        path.write_text(text)
    with pytest.raises(SystemExit) as stopped:
        attention_film.main(
            [
                "--pretrained_weights",
                str(weights),
                "--video",
                str(path),
                "--device",
                "cpu",
                "--output_dir",
                str(tmp_path / "out"),
            ]
        )
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert stopped.value.code == 2 and name in said and fix in said, said
