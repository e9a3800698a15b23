"""Ranking: average precision by hand and by brute force, GeM's limits, whitening, scales; the
revisited protocol.
"""

import argparse
import json
import os
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from test_bad_input import error_of
from torch import nn

from data import Images
from evals import image_retrieval
from evals.image_retrieval import (
    Crops,
    WholeView,
    judgements,
    paper_numbers,
    read_plain_pickle,
    revisited_scores,
    same_class_scores,
)
from evals.retrieval import (
    MultiScale,
    average_precision,
    average_precisions,
    gem,
    learn_release_whitening,
    learn_whitening,
    precision_at,
    ranking_scores,
)
from features import extract_features
from runtime.commandline import InputError
from runtime.creatures import make_creatures
from runtime.hardware import World
from training.backbone import build_backbone

HERE = World(0, 1, torch.device("cpu"), torch.float32)


def bools(text: str) -> torch.Tensor:
    return torch.tensor([letter == "x" for letter in text])


@pytest.mark.parametrize(
    ("relevant", "junk", "by_hand"),
    [
        ("x......", ".......", 1.0),  # first: (1 + 1) / 2
        ("..x....", ".......", (0 + 1 / 3) / 2),
        (".x.x...", ".......", ((0 + 1 / 2) / 2 + (1 / 3 + 2 / 4) / 2) / 2),
        ("x.x....", ".......", ((1 + 1) / 2 + (1 / 2 + 2 / 3) / 2) / 2),
        (".x.x...", "x.x....", 1.0),  # without the junk both are first
        ("..x....", ".x.....", (0 + 1 / 2) / 2),
        ("xxx....", "...xxxx", 1.0),
    ],
)
def test_average_precision_by_hand(relevant, junk, by_hand):
    """AP = 1/P sum (j / r_j + (j + 1) / (r_j + 1)) / 2, junk out of the ranking (Radenovic et al.
    2018).
    """
    found = average_precision(bools(relevant), bools(junk)).item()
    assert found == pytest.approx(by_hand), f"relevant {relevant}, junk {junk}"


def official_precisions(positives: list[int], ks: tuple[int, ...]) -> list[float]:
    """As the revisited benchmarks' compute_map counts them; positives: places from 1 on."""
    found = []
    for k in ks:
        last = min(max(positives), k)
        found.append(sum(place <= last for place in positives) / last)
    return found


@pytest.mark.parametrize(("relevant", "k", "by_hand"), [
    ("x......", 1, 1.0),
    (".x.....", 1, 0.0),
    (".x.x...", 5, 2 / 4),  # the last relevant image stands at place 4: the ranking ends there
    ("x....x.", 5, 1 / 5),
    ("xx.....", 10, 1.0),
])
def test_precision_at_k_by_hand(relevant, k, by_hand):
    nothing = torch.zeros(7, dtype=torch.bool)
    assert precision_at(bools(relevant), nothing, k).item() == pytest.approx(by_hand)


def test_precision_at_k_is_the_benchmark_programs_with_junk_taken_out():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        relevant = torch.rand(23, generator=generator) < 0.2
        junk = (torch.rand(23, generator=generator) < 0.3) & ~relevant
        relevant[7], junk[7] = True, False
        places = [place + 1 for place, one in enumerate(relevant[~junk]) if one]
        found = [precision_at(relevant, junk, k).item() for k in (1, 5, 10)]
        assert found == pytest.approx(official_precisions(places, (1, 5, 10)))
    assert precision_at(junk, junk, 5).isnan(), "junk is no relevant image"


def test_ranking_scores_hold_ap_and_the_precisions_in_their_order():
    features = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.6, 0.5], [0.0, 1.0]])
    relevant = torch.tensor([[False, True, False, True]])
    found = ranking_scores(features[:1], features[1:], relevant[:, 1:], ks=(1, 2, 3))
    assert found[0].tolist() == pytest.approx([(1 + (1 / 2 + 2 / 3) / 2) / 2, 1, 1 / 2, 2 / 3])


def test_the_release_s_whitening_subtracts_the_mean_but_scales_by_moments_around_zero():
    """Without its shift X^T X / m becomes 1, but for directions that were raised to the floor."""
    torch.manual_seed(0)
    features = torch.randn(31, 5) * torch.tensor([3.0, 1, 0.5, 0.1, 1e-9])
    features[:, 0] += 2  # away from zero: scaled around the mean it would be whitened otherwise
    whitening = learn_release_whitening(features)
    whitened = whitening(features)
    assert whitened.shape == (31, 5), "all directions are kept"
    torch.testing.assert_close(whitened.mean(dim=0), torch.zeros(5).double(), atol=1e-8, rtol=0)
    unshifted = features.double() @ whitening.matrix
    moments = unshifted.T @ unshifted / 31
    kept = moments.diagonal() > 0.5
    assert kept.sum() == 4, "the fifth direction's moment is below the floor"
    torch.testing.assert_close(moments[kept][:, kept], torch.eye(4).double(), atol=1e-8, rtol=0)


@pytest.mark.parametrize(
    ("size", "multiscale", "benchmarks"),
    [(512, True, {"rparis6k"}), (224, False, {"roxford5k"}), (224, True, set())],
)
def test_the_paper_s_numbers_stand_beside_the_release_s_sizes_and_scales(
    size, multiscale, benchmarks
):
    flags = argparse.Namespace(multiscale=multiscale)
    found = paper_numbers(flags, {"arch": "vit_small", "patch_size": 16}, size)
    assert {row.partition(",")[0] for row in found} == benchmarks


def test_a_query_without_relevant_images_does_not_count():
    """Its AP is no number, and the mean leaves it out."""
    assert average_precision(bools("....."), bools("..x..")).isnan()
    queries, database = torch.eye(3), torch.eye(3)
    relevant = torch.tensor([[1, 0, 0], [0, 0, 0], [1, 0, 0]]).bool()
    precisions = average_precisions(queries, database, relevant, torch.zeros(3, 3).bool())
    assert precisions.isnan().tolist() == [False, True, False]
    assert precisions.nanmean().item() == pytest.approx((1 + precisions[2].item()) / 2)


def test_average_precisions_are_those_of_a_plain_loop():
    """Every query's ranking sorted and walked through by Python, junk skipped, trapezoids added one
    by one.
    """
    generator = torch.Generator().manual_seed(0)
    queries, database = (
        torch.randn(5, 3, generator=generator),
        torch.randn(31, 3, generator=generator),
    )
    kind = torch.randint(3, (5, 31), generator=generator)  # 0 other, 1 relevant, 2 junk
    found = average_precisions(queries, database, kind == 1, kind == 2)
    for i in range(5):
        cosine = [torch.cosine_similarity(queries[i], row, dim=0).item() for row in database]
        seen = hits = area = 0.0
        for n in sorted(range(31), key=lambda n: -cosine[n]):
            if kind[i, n] == 2:
                continue
            if kind[i, n] == 1:
                area += ((hits / seen if seen else 1) + (hits + 1) / (seen + 1)) / 2
                hits += 1
            seen += 1
        assert found[i].item() == pytest.approx(area / hits), f"query {i}"


JUDGED = [
    {"easy": [0, 3], "hard": [1], "junk": [4], "bbx": [0, 0, 5, 5]},
    {"easy": [], "hard": [2, 5], "junk": [0, 1], "bbx": [0, 0, 5, 5]},
]


@pytest.mark.parametrize(
    ("level", "relevant", "junk"),
    [
        ("easy", [[0, 3], []], [[1, 4], [0, 1, 2, 5]]),
        ("medium", [[0, 1, 3], [2, 5]], [[4], [0, 1]]),
        ("hard", [[1], [2, 5]], [[0, 3, 4], [0, 1]]),
    ],
)
def test_what_each_level_asks_for(level, relevant, junk):
    """Easy: hard is junk; medium: easy and hard are relevant; hard: easy is junk."""
    for mask, wanted in zip(judgements(JUDGED, 7, level), (relevant, junk)):
        assert [row.nonzero().squeeze(1).tolist() for row in mask] == wanted, level


def test_a_level_without_queries_is_left_out():
    """With no easy image at all there is no easy mAP, and the others stay numbers."""
    judged = [{"easy": [], "hard": [2], "junk": [0], "bbx": [0, 0, 5, 5]}]
    found = revisited_scores(torch.randn(1, 3), torch.randn(7, 3), judged)
    assert {name.partition(",")[0] for name in found} == {"medium", "hard"}
    assert revisited_scores(torch.randn(1, 3), torch.randn(7, 3), [JUDGED[1] | {"hard": []}]) == {}


def test_a_image_does_not_find_itself():
    """Each ranks the others: one of a class alone has nothing to find, and twins find each other
    first.
    """
    features = torch.tensor([[1.0, 0, 0], [1, 0.1, 0], [0, 1, 0], [0, 1, 0.1], [0, 0, 1]])
    found = same_class_scores(features, torch.tensor([0, 0, 1, 1, 2]))
    assert found["mAP %"] == found["mP@1 %"] == pytest.approx(100)
    assert same_class_scores(features, torch.tensor([0, 1, 1, 0, 2]))["mAP %"] < 50


def test_gem_goes_from_the_mean_to_the_maximum():
    """(1/N sum x^p)^(1/p): p = 1 is the mean, p -> infinity the maximum; below 1e-6 x counts as
    1e-6.
    """
    tokens = torch.rand(2, 11, 5, generator=torch.Generator().manual_seed(0)).double() + 0.1
    torch.testing.assert_close(gem(tokens, 1), tokens.mean(dim=1))
    torch.testing.assert_close(gem(tokens, 500), tokens.amax(dim=1), rtol=0.01, atol=0)
    torch.testing.assert_close(gem(tokens), (tokens**4).mean(dim=1) ** 0.25)
    torch.testing.assert_close(gem(-tokens), torch.full((2, 5), 1e-6).double())


@pytest.mark.parametrize(("m", "kept"), [(101, 7), (5, 4)])
def test_whitened_features_have_covariance_one(m, kept):
    """On the images it was learnt on; with m <= D of them only m - 1 directions vary, and no others
    are kept.
    """
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(m, 7, generator=generator) @ torch.randn(7, 7, generator=generator) + 3
    whitened = learn_whitening(features)(features)
    assert whitened.shape == (m, kept)
    torch.testing.assert_close(whitened.mean(dim=0), torch.zeros(kept).double(), atol=1e-9, rtol=0)
    torch.testing.assert_close(
        whitened.T @ whitened / m, torch.eye(kept).double(), atol=1e-9, rtol=0
    )


def test_one_scale_is_the_network_itself():
    """MultiScale of one scale is the l2-normalised feature; of three, the normalised mean over
    resized images.
    """
    torch.manual_seed(0)
    network, images = (
        build_backbone("vit_nano", 8, 48, init_std=0.2).eval(),
        torch.randn(2, 3, 48, 64),
    )
    with torch.no_grad():
        torch.testing.assert_close(
            MultiScale(network, 8, (1,))(images), nn.functional.normalize(network(images))
        )
        smaller = [
            nn.functional.interpolate(images, size, mode="bilinear")
            for size in ((32, 48), (24, 32))
        ]
        mean = (network(images) + sum(network(image) for image in smaller)) / 3
        torch.testing.assert_close(MultiScale(network, 8)(images), nn.functional.normalize(mean))


def test_the_whole_image_is_shown_in_whole_patches():
    """The long side is near S, the shape is kept to half a patch, nothing is cropped."""
    view = WholeView(8, size=56, crop=1, mean=(0, 0, 0), std=(1, 1, 1))
    assert view(torch.zeros(3, 400, 300).byte()).shape == (3, 56, 40)
    assert view(torch.zeros(3, 7, 300).byte()).shape == (3, 8, 56)
    ramp = torch.arange(128).byte().expand(3, 64, 128)
    assert (view(ramp)[0, 0, [0, -1]] * 255).tolist() == pytest.approx([0.5, 126.5], abs=1)


def test_queries_are_cropped_to_their_boxes(tmp_path):
    """bbx is left, top, right, bottom in pixels; what sticks out is cut; outside there is nothing
    to show.
    """
    values = np.arange(11 * 13 * 3, dtype=np.uint8).reshape(11, 13, 3)
    Image.fromarray(values).save(tmp_path / "a.png")
    crops = Crops([tmp_path / "a.png"] * 3, [[2.4, 3.0, 7.0, 9.6], [-5, 5, 99, 99], [20, 0, 30, 5]])
    assert np.array_equal(crops[0].permute(1, 2, 0), values[3:10, 2:7])
    assert crops[1].shape == (3, 6, 13)
    with pytest.raises(InputError, match=r"a\.png.*outside the image"):
        crops[2]


@pytest.mark.parametrize("protocol", range(5))
def test_plain_values_and_arrays_survive_a_pickle(tmp_path, protocol):
    """Of protocols 0 to 4: lists, text, bytes, numbers, and NumPy's arrays of one axis."""
    numbers = np.arange(7)
    value = {
        "names": ["a", "é"],
        "bytes": b"\xff\0",
        "twice": [numbers, numbers],
        "none": np.array([]),
        "big": numbers.astype(">i4"),
        "scalar": np.float64(2.5),
    }
    (tmp_path / "value.pkl").write_bytes(pickle.dumps(value, protocol))
    read = read_plain_pickle(tmp_path / "value.pkl")
    assert read.keys() == value.keys()
    for key in value:
        np.testing.assert_array_equal(read[key], value[key], err_msg=key)


class Hostile:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "call",
    [
        (os.mkdir, "proof"),
        (eval, "open('proof', 'w')"),
        (os.system, "touch proof"),
        (np.fromfile, "weights"),
        (getattr, "x", "upper"),
    ],
)
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, monkeypatch, call):
    """Only functions of plain values are called: the file that would prove another is not there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gnd_roxford5k.pkl").write_bytes(
        pickle.dumps({"imlist": ["a"], "gnd": Hostile(*call)})
    )
    with pytest.raises(InputError, match=r"gnd_roxford5k.*never run"):
        read_plain_pickle(tmp_path / "gnd_roxford5k.pkl")
    assert not (tmp_path / "proof").exists(), "the pickle's code ran"


def test_a_pickle_of_python_2_is_read(tmp_path):
    """It has text for bytes: what np.arange(3) and its list were there, protocol 2."""
    head = (
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n"
        b"K\x00\x85U\x01b\x87R(K\x01K\x03\x85"
    )
    dtype = (
        b"cnumpy\ndtype\nU\x02i4K\x00K\x01\x87R(K\x03U\x01<NNN"
        b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
    )
    (tmp_path / "two.pkl").write_bytes(
        head + dtype + b"U\x0c" + np.arange(250, 253, dtype="<i4").tobytes() + b"tb."
    )
    assert read_plain_pickle(tmp_path / "two.pkl") == [250, 251, 252]


def test_an_array_of_objects_is_refused(tmp_path):
    """Bytes that NumPy would take for addresses never become an array."""
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(np.array([[], None], dtype=object)))
    with pytest.raises(InputError, match=r"array of O8.*never run"):
        read_plain_pickle(tmp_path / "a.pkl")


def test_a_torn_pickle_ends_in_one_clear_line(tmp_path):
    """Cut anywhere, with a byte changed, or claiming more than it holds: only InputError."""
    whole = pickle.dumps(
        {"imlist": ["a", "b"], "gnd": [{"easy": np.arange(3), "bbx": [0.5, 1, 2, 3]}]}, 2
    )
    changed = [whole[:i] + bytes([whole[i] ^ 0x55]) + whole[i + 1 :] for i in range(len(whole))]
    claims = [b"\x80\x04B\xff\xff\xff\xff.", b"\x80\x05\x96" + b"\xff" * 8 + b"."]
    for data in [whole[:i] for i in range(len(whole))] + changed + claims:
        (tmp_path / "torn.pkl").write_bytes(data)
        try:
            read_plain_pickle(tmp_path / "torn.pkl")
        except InputError as error:
            assert "torn.pkl" in str(error) and "\n" not in str(error)


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(0)
    torch.save(
        build_backbone("vit_nano", 16, 32, init_std=0.2).state_dict(), tmp_path / "weights.pth"
    )
    return tmp_path / "weights.pth"


@pytest.fixture
def oxford(tmp_path):
    """Seven creatures in the benchmark's layout; queries 0 and 1 are crops of images 0 and 1, which
    are junk.
    """
    drawn, folder = make_creatures(7, 64), tmp_path / "datasets" / "roxford5k"
    (folder / "jpg").mkdir(parents=True)
    names = [f"building_{i}" for i in range(7)]
    for name, image in zip(names, drawn.images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).resize((64, 48)).save(
            folder / "jpg" / f"{name}.jpg"
        )
    judged = [
        {"bbx": [3.2, 4.0, 60.0, 44.0], "easy": [2], "hard": [3, 4], "junk": [0]},
        {"bbx": [0.0, 0.0, 64.0, 48.0], "easy": [], "hard": [5], "junk": np.array([1])},
    ]
    write_truth(folder, {"imlist": names, "qimlist": names[:2], "gnd": judged})
    return folder


def write_truth(folder, truth):
    (folder / "gnd_roxford5k.pkl").write_bytes(pickle.dumps(truth))


FLAGS = "--device cpu --eval_size 32 --num_workers 0".split()


def test_the_revisited_benchmark_from_files_to_a_table(oxford, weights, tmp_path, capsys):
    """The table's mAPs are those of features taken one by one and ranked without the junk."""
    results = tmp_path / "results.jsonl"
    image_retrieval.main(
        [
            "--pretrained_weights",
            str(weights),
            "--data_path",
            str(oxford.parent),
            "--multiscale",
            "false",
            "--results",
            str(results),
            *FLAGS,
        ]
    )
    measured = json.loads(results.read_text())["measured"]
    files, query_files, judged = image_retrieval.read_ground_truth(oxford / "gnd_roxford5k.pkl")
    backbone = build_backbone("vit_nano", 16, 32).eval()
    backbone.load_state_dict(torch.load(weights, weights_only=True))
    view = WholeView(16, size=32, crop=1)
    queries, database = (
        extract_features(backbone, Images(source), view, HERE, batch_size=1)
        for source in (Crops(query_files, [one["bbx"] for one in judged]), files)
    )
    expected = revisited_scores(queries, database, judged)
    scores = ("mAP %", "mP@1 %", "mP@5 %", "mP@10 %")
    levels = image_retrieval.LEVELS
    assert set(expected) == {f"{level}, {score}" for level in levels for score in scores}
    for name, value in expected.items():
        assert measured[f"roxford5k, {name}"] == pytest.approx(value, abs=1e-3)
    assert "roxford5k, medium, mAP %" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"qimlist": ["building_0"]}, "no ground truth"),
        ({"gnd": 7}, "no ground truth"),
        ({"imlist": None}, "no ground"),
        (
            {"gnd": [{"bbx": [0, 0, 9, 9], "easy": [99], "hard": [], "junk": []}] * 2},
            "no ground truth",
        ),
        ({"imlist": ["nowhere", "building_1"]}, "nowhere.jpg"),
        (
            {"gnd": [{"bbx": [0, 0, 9, 9], "easy": [], "hard": [], "junk": [1]}] * 2},
            "no ground truth",
        ),
        (
            {"gnd": [{"bbx": [float("nan"), 0, 9, 9], "easy": [1], "hard": [], "junk": []}] * 2},
            "no ground truth",
        ),
        ({"gnd": Hostile(os.mkdir, "proof")}, "never run"),
        (np.arange(3), "no ground truth"),
    ],
)
def test_a_ground_truth_that_does_not_fit_is_named(
    oxford, weights, capsys, monkeypatch, tmp_path, change, said
):
    """Lists of other lengths, numbers of no image, missing images, junk only, code: one line with
    the fix.
    """
    monkeypatch.chdir(tmp_path)
    truth = {
        "imlist": [f"building_{i}" for i in range(7)],
        "qimlist": ["building_0", "building_1"],
        "gnd": [{"bbx": [0, 0, 9, 9], "easy": [1], "hard": [], "junk": []}] * 2,
    }
    write_truth(oxford, truth | change if isinstance(change, dict) else change)
    line = error_of(
        image_retrieval.main, capsys, "--pretrained_weights", weights, "--data_path", oxford, *FLAGS
    )
    assert said in line and (said == "nowhere.jpg" or "gnd_roxford5k.pkl" in line)
    assert not (tmp_path / "proof").exists()


def test_class_folders_are_a_retrieval_task(weights, tmp_path, capsys):
    """Images of a class look alike here, so that pixels find them all; without labels the line says
    what to do.
    """
    for i in range(6):
        folder = tmp_path / "photos" / f"class {i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), [(200, 30 + i, 90), (30, 30 + i, 190)][i % 2]).save(
            folder / f"{i}.png"
        )
    flags = [
        "--pretrained_weights",
        weights,
        "--results",
        tmp_path / "results.jsonl",
        *FLAGS,
        "--data_path",
    ]
    image_retrieval.main([str(flag) for flag in [*flags, tmp_path / "photos"]])
    measured = json.loads((tmp_path / "results.jsonl").read_text())["measured"]
    assert measured["raw pixels, same class, mAP %"] == pytest.approx(100)
    capsys.readouterr()
    assert "neither labels nor gnd_*.pkl" in error_of(
        image_retrieval.main, capsys, *flags, tmp_path / "photos" / "class 0"
    )
