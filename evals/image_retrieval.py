"""Image retrieval with frozen features (Sec. 4.2.1, Table 3): images of a landmark, nearest first.

Revisited Oxford and Paris (Radenovic et al. 2018): for every query, cropped to its landmark, each
image is easy, hard, junk or another place. Junk is taken out of the ranking, not counted wrong.
What a level does not ask for is junk too:

    level    relevant      junk
    easy     easy          junk, hard
    medium   easy, hard    junk
    hard     hard          junk, easy

Queries without a relevant image do not count. Reported are mAP and, as the benchmarks' own program
does, mP@k for k = 1, 5 and 10. DINO ViT-S/16 of ImageNet: mAP 41.8 medium, 13.7 hard on Oxford,
63.1 and 34.4 on Paris; learnt on Google Landmarks v2 51.5, 24.3, 75.3 and 51.6 (weights that are
not here). The release's commands are those below: Paris at 512 pixels and three scales, Oxford at
224 and one. The paper's numbers are printed beside these alone.
Departures: the release shows the queries whole; its images are at most --eval_size long and resized
by Lanczos, ours just that, in whole patches, and bicubically.

    python -m evals.image_retrieval --pretrained_weights runs/demo/checkpoint.pth
    python -m evals.image_retrieval --pretrained dino_vits16 --data_path rparis6k/ --eval_size 512
    python -m evals.image_retrieval --pretrained dino_vits16 --data_path roxford5k/ \\
        --eval_size 224 --multiscale false

--data_path: a folder that holds, or whose folders hold, gnd_roxford5k.pkl or gnd_rparis6k.pkl
beside jpg/. Or a folder of class folders: each image (of val/, if there is one) ranks the others,
and those of its class are relevant; of few images the same network untrained and raw pixels stand
beside it.

Shapes: q queries, n images in the database, D width.
"""
import codecs
import io
import math
import os
import pickle
import re
from argparse import Namespace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from data import Images, decode
from evals.retrieval import MultiScale, ranking_scores
from features import EvaluationView, Pixels, extract_features, normalise
from runtime.commandline import InputError, brief, true_or_false
from runtime.hardware import World
from training import evaluation

PAPER = {  # Table 3: networks trained on ImageNet
    ("vit_small", 16): {
        "roxford5k, medium, mAP %": 41.8,
        "roxford5k, hard, mAP %": 13.7,
        "rparis6k, medium, mAP %": 63.1,
        "rparis6k, hard, mAP %": 34.4,
    },
    ("resnet50", 1): {
        "roxford5k, medium, mAP %": 35.4,
        "roxford5k, hard, mAP %": 11.1,
        "rparis6k, medium, mAP %": 55.9,
        "rparis6k, hard, mAP %": 27.5,
    },
}
RELEASE = {  # --eval_size and --multiscale of the release's commands
    "roxford5k": (224, False),
    "rparis6k": (512, True),
}
KS = (1, 5, 10)  # of mP@k
SCORES = ("mAP %", *(f"mP@{k} %" for k in KS))
LEVELS = {  # which images are relevant, and which are junk
    "easy": (["easy"], ["junk", "hard"]),
    "medium": (["easy", "hard"], ["junk"]),
    "hard": (["hard"], ["junk", "easy"]),
}

class PlainDtype:
    """Stands for np.dtype, whose own state could make NumPy take bytes for addresses."""

    def __init__(self, code: str, *_):
        if not re.fullmatch(r"[biuf][1248]", code):
            raise pickle.UnpicklingError(f"it holds an array of {code}")
        self.code = code

    def __setstate__(self, state: tuple) -> None:
        self.code = state[1] + self.code  # the order of the bytes


class PlainArray(list):
    """Stands for an np.ndarray of one axis."""

    def __setstate__(self, state: tuple) -> None:
        _, _, dtype, _, values = state
        if isinstance(values, str):  # written by Python 2
            values = values.encode("latin1")
        if values:
            self.extend(np.frombuffer(values, dtype.code).tolist())


PLAIN = {  # what a pickle of text and NumPy's numbers calls: name -> what stands for it
    "dtype": PlainDtype,
    "ndarray": PlainArray,
    "_reconstruct": lambda *_: PlainArray(),
    "scalar": lambda dtype, value: np.frombuffer(value, dtype.code)[0].item(),
    "encode": codecs.encode,
    "bytes": lambda: b"",  # without an argument: bytes(10**12) would fill the memory
}


class PlainUnpickler(pickle.Unpickler):
    """A pickle is a program that may call any function by its name. This one may call PLAIN's."""

    def find_class(self, module: str, name: str):
        package = module.split(".")[0]  # NumPy and Python 3 have renamed their modules
        if package not in ("numpy", "_codecs", "__builtin__") or name not in PLAIN:
            raise pickle.UnpicklingError(f"it calls {module}.{name}")
        return PLAIN[name]


def read_plain_pickle(file: Path) -> object:
    """Return the lists, dicts, text and numbers of a pickle. Raise InputError for anything else."""
    if not os.path.isfile(file):
        raise InputError(f"no pickle at {str(file)!r}: check the path")
    try:
        return PlainUnpickler(io.BytesIO(file.read_bytes()), encoding="latin1").load()
    except Exception as error:  # a damaged pickle raises almost anything
        raise InputError(
            f"{str(file)!r} is no pickle of plain values ({brief(error)}), and code in it is never "
            "run: use the published file"
        ) from None


class WholeView(EvaluationView):
    """The whole image, its long side near S pixels, both sides in whole patches.

    uint8 (3, H, W) -> float (3, h, w).
    """

    def __init__(self, patch_size: int, **settings):
        super().__init__(**settings)
        self.patch_size = patch_size

    def __call__(self, image: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        short_side = self.size * min(height, width) / max(height, width)
        image = evaluation.fit_to_patches(image, short_side, self.patch_size)
        return normalise(image, self.mean, self.std)


class Crops(Dataset):
    """Files cropped to boxes (left, top, right, bottom) in pixels: crops[i] -> uint8 (3, h, w)."""

    def __init__(self, files: list[Path], boxes: list[list[float]]):
        self.files = files
        self.boxes = boxes

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        left, top, right, bottom = (max(0, round(side)) for side in self.boxes[index])
        image = decode(self.files[index])[:, top:bottom, left:right]
        if image.numel() == 0:
            raise InputError(
                f"the ground truth's bbx {self.boxes[index]} of {str(self.files[index])!r} lies "
                "outside the image: use the pair that belongs together"
            )
        return image


def read_judgements(truth: dict, number: int) -> list[dict[str, list]]:
    """Return each query's bbx, easy, hard and junk. Raise ValueError where they cannot be meant.

    number: of images in the database.
    """
    judged = []
    for query in truth["gnd"]:
        judgement = {"bbx": [float(side) for side in query["bbx"]]}
        if len(judgement["bbx"]) != 4 or not all(map(math.isfinite, judgement["bbx"])):
            raise ValueError
        for kind in ("easy", "hard", "junk"):
            judgement[kind] = list(query[kind])
            if not all(image in range(number) for image in judgement[kind]):
                raise ValueError
        judged.append(judgement)
    if not any(query["easy"] or query["hard"] for query in judged):
        raise ValueError
    return judged


def read_ground_truth(file: Path) -> tuple[list[Path], list[Path], list[dict[str, list]]]:
    """Return the database's files, the queries' files, and each query's bbx, easy, hard and junk.

    The last three are numbers of images in the database.
    """
    truth = read_plain_pickle(file)
    try:
        folder = file.parent / "jpg"
        database = [folder / (name + ".jpg") for name in truth["imlist"]]
        queries = [folder / (name + ".jpg") for name in truth["qimlist"]]
        judged = read_judgements(truth, len(database))
        if len(queries) != len(judged):
            raise ValueError
    except (TypeError, LookupError, ValueError):
        raise InputError(
            f"{str(file)!r} is no ground truth of the revisited benchmarks (imlist, qimlist, and "
            "gnd with bbx, easy, hard and junk of each query): use the published file"
        ) from None
    missing = [path for path in database + queries if not os.path.isfile(path)]
    if missing:
        raise InputError(
            f"{len(missing)} images of {str(file)!r} are missing, first {str(missing[0])!r}: put "
            "all of them there"
        )
    return database, queries, judged


def judgements(judged: list[dict[str, list]], n: int, level: str) -> tuple[Tensor, Tensor]:
    """Return which images are relevant to each query at this level, and which are junk.

    -> two bool (q, n).
    """
    relevant = torch.zeros(len(judged), n, dtype=torch.bool)
    junk = torch.zeros(len(judged), n, dtype=torch.bool)
    relevant_kinds, junk_kinds = LEVELS[level]
    for row, query in enumerate(judged):
        for kind in relevant_kinds:
            relevant[row, query[kind]] = True
        for kind in junk_kinds:
            junk[row, query[kind]] = True
    return relevant, junk


def mean_scores(scores: Tensor) -> dict[str, float]:
    """Return mAP and mP@k in %, means over the queries that count: (q, 4) -> {} if none does."""
    counting = scores[~scores.isnan().any(dim=1)]
    if len(counting) == 0:
        return {}
    return dict(zip(SCORES, (100 * counting.mean(dim=0)).tolist()))


def revisited_scores(
    queries: Tensor, database: Tensor, judged: list[dict[str, list]]
) -> dict[str, float]:
    """Return mAP and mP@k in % by level: features (q, D), (n, D) -> {"medium, mAP %": ...}.

    Levels without a query that counts are left out.
    """
    means = {}
    for level in LEVELS:
        relevant, junk = judgements(judged, len(database), level)
        scores = mean_scores(ranking_scores(queries, database, relevant, junk, KS))
        for name, value in scores.items():
            means[f"{level}, {name}"] = value
    return means


def same_class_scores(features: Tensor, labels: Tensor) -> dict[str, float]:
    """Return mAP and mP@k in % when each image ranks all others, by label: (n, D), (n,)."""
    numbers = torch.arange(len(labels))
    scores = []
    for rows in numbers.split(1000):  # so that n x n numbers never stand in memory
        relevant = labels[rows, None] == labels
        itself = rows[:, None] == numbers
        scores.append(ranking_scores(features[rows], features, relevant, itself, KS))
    means = mean_scores(torch.cat(scores))
    if not means:
        raise InputError("no class has two images, so no image has another to find: add some")
    return means


def measure_revisited(
    network: nn.Module, args: dict, truths: list[Path], flags: Namespace, world: World
) -> tuple[dict[str, float], str]:
    """Return mAP and mP@k of every benchmark and level, and which data it was."""
    if flags.skip_bad_images:
        raise InputError(
            "--skip_bad_images does not go with a ground truth, which numbers its images: fix them"
        )
    kind = partial(WholeView, args["patch_size"])
    view = evaluation.evaluation_view(flags, args | {"eval_crop": 1}, kind)
    loading = evaluation.loading(flags, world)
    loading["batch_size"] = 1  # each image has a shape of its own
    measured = {}
    for truth in truths:
        files, query_files, judged = read_ground_truth(truth)
        crops = Images(Crops(query_files, [query["bbx"] for query in judged]))
        queries = extract_features(network, crops, view, world, **loading)
        database = extract_features(network, Images(files), view, world, **loading)
        benchmark = truth.stem.removeprefix("gnd_")
        for name, mean in revisited_scores(queries, database, judged).items():
            measured[f"{benchmark}, {name}"] = mean
    return measured, f"{evaluation.data_name(flags)}: long side {view.size} pixels"


def measure_same_class(
    network: nn.Module, args: dict, flags: Namespace, world: World
) -> tuple[dict[str, float], str]:
    """Return mAP and mP@k of labelled images, and which data it was.

    They are of the network and, for few images, of what it has to beat.
    """
    images = evaluation.load_test_or_train(
        flags, world, args, lacks="neither labels nor gnd_*.pkl"
    )
    view = evaluation.evaluation_view(flags, args)
    loading = evaluation.loading(flags, world)
    networks = {args["arch"]: network}
    if len(images) <= evaluation.FEW:
        untrained = evaluation.untrained(args, world)
        networks["untrained"] = MultiScale(untrained, args["patch_size"], network.scales)
        networks["raw pixels"] = Pixels()
    measured = {}
    for name, one in networks.items():
        features = extract_features(one, images, view, world, **loading)
        for score, value in same_class_scores(features, images.labels).items():
            measured[f"{name}, same class, {score}"] = value
    source = evaluation.data_name(flags)
    return measured, f"{source}: {len(images)} images rank each other, {view.size} pixels"


def paper_numbers(flags: Namespace, args: dict, size: int) -> dict[str, float]:
    """Return Table 3's numbers of this network, of the benchmarks that these flags suit."""
    numbers = {}
    for row, value in PAPER.get((args["arch"], args["patch_size"]), {}).items():
        benchmark = row.partition(",")[0]
        if RELEASE[benchmark] == (size, flags.multiscale):
            numbers[row] = value
    return numbers


def measure_retrieval(flags: Namespace, world: World) -> None:
    """Report mAP and mP@k by the ground truths that --data_path holds, else by its labels."""
    backbone, args = evaluation.load_backbone(flags, world)
    if flags.multiscale:
        network, scales = MultiScale(backbone, args["patch_size"]), "three scales"
    else:
        network, scales = MultiScale(backbone, args["patch_size"], (1,)), "one scale"
    truths = []
    wanted = "*"
    if flags.dataset in RELEASE:  # release: one of both, in a folder of its name
        wanted = flags.dataset
    if flags.data_path and (wanted != "*" or not flags.dataset):
        folder = Path(flags.data_path)
        truths = sorted([*folder.glob(f"gnd_{wanted}.pkl"), *folder.glob(f"*/gnd_{wanted}.pkl")])
    if wanted != "*" and not truths:
        raise InputError(
            f"--data_path {flags.data_path!r} holds no gnd_{wanted}.pkl: leave --dataset out, or "
            "give the folder of the benchmark"
        )
    if truths:
        measured, data = measure_revisited(network, args, truths, flags, world)
    else:
        measured, data = measure_same_class(network, args, flags, world)
    paper = paper_numbers(flags, args, evaluation.view_size(flags, args))
    medium = PAPER["vit_small", 16]["roxford5k, medium, mAP %"]
    title = f"image retrieval (Table 3: ViT-S/16 has mAP {medium} on ROxford, medium)"
    evaluation.report(flags, world, title, args, f"{data}, {scales}", measured, paper)


def main(argv: list[str] | None = None) -> None:
    parser = evaluation.command_line(__doc__)
    parser.add_argument("--multiscale", type=true_or_false, default=True, metavar="BOOL",
                        help="average the features at scales 1, 1/sqrt 2 and 1/2 [true]")
    flags = parser.parse_args(argv)
    with evaluation.start(flags) as world:
        measure_retrieval(flags, world)


if __name__ == "__main__":
    main()
