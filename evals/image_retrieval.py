"""Image retrieval with frozen features (Sec. 4.2.1, Table 3): images of the same landmark, nearest first.

Revisited Oxford and Paris (Radenovic et al. 2018): of every query, cropped to its landmark, each image is easy, hard,
junk or another place. Junk is taken out of the ranking, not counted wrong; what a level does not ask for is junk too:

    level    relevant      junk
    easy     easy          junk, hard
    medium   easy, hard    junk
    hard     hard          junk, easy

Queries without a relevant image do not count. DINO ViT-S/16 of ImageNet: mAP 41.8 medium, 13.7 hard on Oxford, 63.1
and 34.4 on Paris; learnt on Google Landmarks v2 51.5, 24.3, 75.3 and 51.6. The release's commands are
those below: Paris at 512 pixels and three scales, Oxford at 224 and one. Departures: the release shows the queries
whole; its images are at most --eval_size long, ours just that, in whole patches.

    python -m evals.image_retrieval --pretrained_weights runs/demo/checkpoint.pth
    python -m evals.image_retrieval --pretrained dino_vits16 --data_path rparis6k/ --eval_size 512
    python -m evals.image_retrieval --pretrained dino_vits16 --data_path roxford5k/ --eval_size 224 --multiscale false

--data_path: a folder that holds, or whose folders hold, gnd_roxford5k.pkl or gnd_rparis6k.pkl beside jpg/; else one of
class folders: each image (of val/, if there is one) ranks the others, and those of its class are relevant.

Shapes: q queries, n images in the database, D width.
"""
import math
import operator
import os
from argparse import Namespace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from data import Images, decode
from evals.plain_pickle import read_plain_pickle
from evals.retrieval import MultiScale, average_precisions
from features import EvaluationView, Pixels, extract_features, fit_to_patches, normalise
from runtime.commandline import InputError, true_or_false
from runtime.hardware import World
from training import evaluation as common

PAPER = {("vit_small", 16): {"roxford5k, medium, mAP %": 41.8, "roxford5k, hard, mAP %": 13.7,
                             "rparis6k, medium, mAP %": 63.1, "rparis6k, hard, mAP %": 34.4},
         ("resnet50", 1): {"roxford5k, medium, mAP %": 35.4, "roxford5k, hard, mAP %": 11.1,
                           "rparis6k, medium, mAP %": 55.9, "rparis6k, hard, mAP %": 27.5}}  # Table 3, of ImageNet
LEVELS = {"easy": (["easy"], ["junk", "hard"]), "medium": (["easy", "hard"], ["junk"]),
          "hard": (["hard"], ["junk", "easy"])}  # whose images are relevant, and whose junk


class WholeView(EvaluationView):
    """The whole image, its long side near S pixels, both in whole patches: uint8 (3, H, W) -> float (3, h, w)."""

    def __init__(self, patch_size: int, **settings):
        super().__init__(**settings)
        self.patch_size = patch_size

    def __call__(self, image: Tensor) -> Tensor:
        short_side = self.size * min(image.shape[-2:]) / max(image.shape[-2:])
        return normalise(fit_to_patches(image, short_side, self.patch_size), self.mean, self.std)


class Crops(Dataset):
    """Images cropped to boxes (left, top, right, bottom) in pixels: files, (q, 4) -> uint8 (3, h, w)."""

    def __init__(self, files: list[Path], boxes: list[list[float]]):
        self.files, self.boxes = files, boxes

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        left, top, right, bottom = (max(0, round(side)) for side in self.boxes[index])
        image = decode(self.files[index])[:, top:bottom, left:right]
        if not image.numel():
            raise InputError(f"the ground truth's bbx {self.boxes[index]} of {str(self.files[index])!r} lies outside "
                             "the image: use the pair that belongs together")
        return image


def read_ground_truth(file: Path) -> tuple[list[Path], list[Path], list[dict[str, list]]]:
    """gnd_*.pkl -> (the database's files, the queries' files, of each query bbx and the numbers easy, hard, junk)."""
    truth = read_plain_pickle(file)
    try:
        database, queries = ([file.parent / "jpg" / (name + ".jpg") for name in truth[key]] for key in
                             ("imlist", "qimlist"))
        judged = [{"bbx": [float(side) for side in one["bbx"]]} |
                  {key: [operator.index(number) for number in one[key]] for key in ("easy", "hard", "junk")}
                  for one in truth["gnd"]]
        fits = len(queries) == len(judged) and any(one["easy"] or one["hard"] for one in judged) and all(
            len(one["bbx"]) == 4 and all(map(math.isfinite, one["bbx"]))
            and all(0 <= i < len(database) for i in one["easy"] + one["hard"] + one["junk"])
            for one in judged)
    except (TypeError, LookupError, ValueError, OverflowError, MemoryError):
        fits = False
    if not fits:
        raise InputError(f"{str(file)!r} is no ground truth of the revisited benchmarks (imlist, qimlist, and gnd with "
                         "bbx, easy, hard, junk of each query, not all of them empty): use the published file")
    missing = [path for path in database + queries if not os.path.isfile(path)]
    if missing:
        raise InputError(f"{len(missing)} images of {str(file)!r} are missing, first {str(missing[0])!r}: put all of "
                         "them there")
    return database, queries, judged


def judgements(judged: list[dict[str, list]], n: int, level: str) -> tuple[Tensor, Tensor]:
    """Which images are relevant to each query at this level, and which are junk: two (q, n) bool."""
    masks = torch.zeros(2, len(judged), n, dtype=torch.bool)
    for mask, keys in zip(masks, LEVELS[level]):
        for row, one in zip(mask, judged):
            row[[i for key in keys for i in one[key]]] = True
    return masks[0], masks[1]


def revisited_map(queries: Tensor, database: Tensor, judged: list[dict[str, list]]) -> dict[str, float]:
    """Level -> mAP in %, levels without a query that counts left out: features (q, D) and (n, D)."""
    means = {level: 100 * average_precisions(queries, database, *judgements(judged, len(database), level)).nanmean()
             for level in LEVELS}
    return {level: mean.item() for level, mean in means.items() if not mean.isnan()}


def same_class_map(features: Tensor, labels: Tensor) -> float:
    """mAP in % when each image ranks all others and those of its label are relevant: (n, D), (n,)."""
    numbers = torch.arange(len(labels))
    precisions = [average_precisions(features[rows], features, labels[rows, None] == labels, rows[:, None] == numbers)
                  for rows in numbers.split(1000)]  # so that n x n never stands in memory
    mean = torch.cat(precisions).nanmean().item()
    if math.isnan(mean):
        raise InputError("no class has two images, so no image has another to find: add some")
    return 100 * mean


def main(argv: list[str] | None = None) -> None:
    parser = common.command_line(__doc__)
    parser.add_argument("--multiscale", type=true_or_false, default=True, metavar="BOOL",
                        help="average the features at scales 1, 1/sqrt 2 and 1/2 [true]")
    common.run(parser, evaluate, argv)


def evaluate(flags: Namespace, world: World) -> None:
    """The ground truths that --data_path holds, else its labels, and a table of mAPs."""
    backbone, args = common.load_backbone(flags, world)
    network = MultiScale(backbone, args["patch_size"], *([] if flags.multiscale else [(1,)]))
    folder = Path(flags.data_path)
    truths = sorted([*folder.glob("gnd_*.pkl"), *folder.glob("*/gnd_*.pkl")]) if flags.data_path else []
    if flags.dataset or not truths:
        measured, data = labelled(network, args, flags, world)
    else:
        measured, data = revisited(network, args, truths, flags, world)
    paper = PAPER.get((args["arch"], args["patch_size"]), {})
    medium = PAPER["vit_small", 16]["roxford5k, medium, mAP %"]
    common.tell(flags, world, f"image retrieval (Table 3: ViT-S/16 has mAP {medium} on ROxford, medium)", args,
                f"{data}, {'three scales' if flags.multiscale else 'one scale'}", measured, paper)


def revisited(network: nn.Module, args: dict, truths: list[Path], flags: Namespace,
              world: World) -> tuple[dict[str, float], str]:
    """(mAP of every benchmark and level, what data it was)."""
    if flags.skip_bad_images:
        raise InputError("--skip_bad_images does not go with a ground truth, which numbers its images: mend them")
    measured = {}
    view = common.evaluation_view(flags, args | {"eval_crop": 1}, partial(WholeView, args["patch_size"]))
    loading = common.loading(flags, world) | {"batch_size": 1}  # each image has a shape of its own
    for truth, (files, query_files, judged) in [(truth, read_ground_truth(truth)) for truth in truths]:
        queries = Crops(query_files, [one["bbx"] for one in judged])
        features = [extract_features(network, Images(source), view, world, **loading) for source in (queries, files)]
        found = revisited_map(*features, judged)
        measured |= {f"{truth.stem.removeprefix('gnd_')}, {level}, mAP %": value for level, value in found.items()}
    return measured, f"{common.source(flags)}: long side {view.size} pixels"


def labelled(network: nn.Module, args: dict, flags: Namespace, world: World) -> tuple[dict[str, float], str]:
    """The same of labelled images: (mAP of the network and of raw pixels, what data it was)."""
    train, val = common.load_images(flags, world)
    images = train if val is None or val.labels is None else val
    if images.labels is None:
        raise InputError(f"--data_path {flags.data_path!r} has neither labels nor gnd_*.pkl: put images into class "
                         "folders")
    images = images.subset((images.labels >= 0).nonzero().squeeze(1))
    view, networks = common.evaluation_view(flags, args), {args["arch"]: network}
    if len(images) <= 20_000:  # more raw pixels than that fill the memory
        networks["raw pixels"] = Pixels()
    measured = {f"{name}, same class, mAP %": same_class_map(extract_features(
        one, images, view, world, **common.loading(flags, world)), images.labels)
        for name, one in networks.items()}
    return measured, f"{common.source(flags)}: {len(images)} images rank each other, {view.size} pixels"


if __name__ == "__main__":
    main()
