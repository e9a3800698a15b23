"""Every setting of a training as one dataclass, which is also the command line; and the presets.

Names and defaults are the release's, where it has the flag.
A preset is a set of changes to the defaults; single flags override it.
"""

import math
import operator
import re
from argparse import SUPPRESS
from dataclasses import dataclass, field, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from data import has_images
from runtime.augment import IMAGENET_MEAN, IMAGENET_STD
from runtime.commandline import CommandLine, InputError, true_or_false

# ViT -> D, the numbers of a token
VITS = {"vit_nano": 128, "vit_tiny": 192, "vit_small": 384, "vit_base": 768}
RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
ARCHS = (*VITS, *RESNETS)

MANY_IMAGES = 50_000  # the least for which the paper's recipe is the default

LIMITS = {  # what a setting's metadata may demand of its value, or of each of its values
    "at_least": operator.ge,
    "above": operator.gt,
    "at_most": operator.le,
    "below": operator.lt,
}


def setting(default: Any, help: str, **metadata: Any) -> Any:
    """Return a field of Settings: its default, its --help text, and what else is known of it.

    at_least, above, at_most, below: limits; choices: the values there are.
    fixed: a run is not continued with another value, which would not fit the saved tensors.
    quiet: a run may be continued with another value, and no line says so.
    """
    return field(default=default, metadata={"help": help, **metadata})


@dataclass
class Settings:
    """All settings: views in pixels, scales as fractions of the area, warm-ups in epochs."""

    # -- data
    preset: str = setting(
        "",
        "a recipe by name: demo, lab, photos, small, imagenette, vanilla, vits16, vits8, vitb16, "
        "vitb8, resnet50; by default demo without data, photos with fewer than 50,000 images, and "
        "vits16",
        quiet=True,
    )
    data_path: str = setting(
        "",
        "a folder of class folders, of images, or with train/ and val/; without it the embedded "
        "images",
    )
    dataset: str = setting(
        "",
        "one of torchvision's instead, kept under --data_path: cifar10, stl10, imagenette, "
        "flowers102, oxford_pets ...",
    )
    download: bool = setting(
        False, "fetch --dataset over the network if it is not there", quiet=True
    )
    skip_bad_images: bool = setting(
        False, "read every image once at the start and leave out those that cannot be read"
    )
    levels: tuple[float, float] = setting(
        (0.0, 0.0),
        "values that become black and white in images of more than 8 bits; 0 0: found in the data",
    )
    num_workers: int = setting(
        -1,
        "processes that decode and augment; 0: none, the training's does it; -1: one a core, at "
        "most 10, and without a GPU one in four cores, since the network needs the others",
        at_least=-1,
        at_most=1024,
        quiet=True,
    )
    in_memory: str = setting(
        "auto",
        "keep the images on the device as uint8, at most twice the global crops' size: true, "
        "false, or auto, if they take less than a quarter of the free memory",
        choices=("auto", "true", "false"),
        quiet=True,
    )

    # -- network
    arch: str = setting("vit_small", ", ".join(ARCHS), choices=ARCHS, fixed=True)
    patch_size: int = setting(
        16, "pixels; smaller patches are better and slower (Fig. 5)", at_least=1, fixed=True
    )
    drop_path_rate: float = setting(0.1, "stochastic depth of the student", at_least=0, below=1)
    num_heads: int = setting(0, "of the ViT's attention; 0: the arch's own", at_least=0, fixed=True)
    init_std: float = setting(
        0.02,
        "standard deviation of the initial weights; narrow networks and short runs want more, "
        "about 0.06",
        above=0,
    )
    out_dim: int = setting(
        65536,
        "K, the number of prototypes; small data wants fewer, 1024 to 4096",
        at_least=2,
        fixed=True,
    )
    head_hidden_dim: int = setting(
        2048, "width of the head's hidden layers", at_least=1, fixed=True
    )
    head_bottleneck_dim: int = setting(
        256, "width of its l2-normalised bottleneck", at_least=1, fixed=True
    )
    use_bn_in_head: bool = setting(
        False, "batch normalisation in the head; the paper does without", fixed=True
    )
    head_nlayers: int = setting(
        3,
        "layers of the head before the prototypes (appendix C counts these too: 4)",
        at_least=1,
        at_most=100,
        fixed=True,
    )
    norm_last_layer: bool = setting(
        True,
        "freeze the prototypes' gain at 1; false trains a little better where it is stable (ViT-S)",
        fixed=True,
    )

    # -- loss and teacher
    student_temp: float = setting(0.1, "the student's softmax temperature", above=0)
    warmup_teacher_temp: float = setting(
        0.04,
        "the teacher's at the start; lower it if the loss does not fall",
        above=0,
    )
    teacher_temp: float = setting(
        0.04,
        "the teacher's after its warm-up; constant at 0.08 it collapses (appendix D); 0.1 = "
        "student_temp: no sharpening",
        above=0,
    )
    warmup_teacher_temp_epochs: float = setting(
        0.0, "epochs of its warm-up (30 in the paper)", at_least=0
    )
    center_momentum: float = setting(
        0.9,
        "of the center's average; 1 keeps it at zero: no centering, to see the collapse",
        at_least=0,
        at_most=1,
    )
    momentum_teacher: float = setting(
        0.996,
        "of the teacher's average, at the start; small DATA wants it lower (0.99), a small BATCH "
        "higher (0.9995)",
        at_least=0,
        at_most=1,
    )
    momentum_teacher_end: float = setting(
        1.0,
        "and at the end; a run of few steps wants it below 1, or its teacher stops moving early",
        at_least=0,
        at_most=1,
    )

    # -- optimisation
    optimizer: str = setting(
        "adamw",
        "adamw (ViT), sgd (convnets) or lars (convnets, large batches)",
        choices=("adamw", "sgd", "lars"),
        fixed=True,
    )
    epoch_images: int = setting(
        0,
        "repeat a smaller data set within an epoch, up to about so many images; 0: each once",
        at_least=0,
    )
    epochs: int = setting(100, "passes over the data", at_least=1)
    batch_size_per_gpu: int = setting(64, "images a process and a micro-batch", at_least=1)
    accumulate: int = setting(
        1, "micro-batches a step; center, teacher and schedules move once a step", at_least=1
    )
    lr: float = setting(
        0.0005,
        "at the end of the warm-up, per 256 images of a step: scaled by (images a step) / 256",
        at_least=0,
    )
    warmup_epochs: float = setting(
        10.0, "epochs of the learning rate's linear warm-up, to the nearest step", at_least=0
    )
    min_lr: float = setting(1e-6, "at the end of its cosine", at_least=0)
    weight_decay: float = setting(0.04, "its value at the start of its cosine", at_least=0)
    weight_decay_end: float = setting(0.4, "and at the end", at_least=0)
    clip_grad: float = setting(
        3.0, "largest gradient norm of each parameter tensor by itself; 0: no clipping", at_least=0
    )
    freeze_last_layer: int = setting(
        1,
        "epochs during which the prototypes get no gradient; more if the loss does not fall",
        at_least=0,
    )

    # -- crops
    global_crops_size: int = setting(224, "pixels", at_least=1, at_most=4096, fixed=True)
    local_crops_size: int = setting(96, "pixels", at_least=1, at_most=4096)
    global_crops_scale: tuple[float, float] = setting(
        (0.4, 1.0), "fractions of the image's area; without locals use 0.14 1", above=0, at_most=1
    )
    local_crops_scale: tuple[float, float] = setting(
        (0.05, 0.4), "fractions of the image's area", above=0, at_most=1
    )
    local_crops_number: int = setting(
        8, "local views an image; 0: no multi-crop", at_least=0, at_most=1000
    )
    color_jitter: tuple[float, float, float, float] = setting(
        (0.4, 0.4, 0.2, 0.1),
        "brightness, contrast, saturation, hue (0.5: the whole circle)",
        at_least=0,
    )
    blur: tuple[float, float, float] = setting(
        (1.0, 0.1, 0.5),
        "chance of a Gaussian blur on global 1, global 2 and each local",
        at_least=0,
        at_most=1,
    )
    solarize: float = setting(0.2, "chance of solarisation on global 2", at_least=0, at_most=1)
    mean: tuple[float, float, float] = setting(IMAGENET_MEAN, "subtracted from pixels in 0 ... 1")
    std: tuple[float, float, float] = setting(IMAGENET_STD, "and then divided by", above=0)

    # -- the run
    output_dir: str = setting(
        "runs/default",
        "gets checkpoint.pth, log.txt, curves.png, attention.png; a run found there is continued",
        quiet=True,
    )
    init_from: str = setting(
        "",
        "start from a checkpoint's weights, or from dino_vits16 and so on, the authors', with a "
        "fresh optimiser and schedules",
        fixed=True,
    )
    init_head: bool = setting(
        True, "take the head and its center from there too; false: --out_dim may be another"
    )
    saveckp_freq: int = setting(
        20,
        "keep checkpoint0020.pth and so on every so many epochs; 0: only checkpoint.pth",
        at_least=0,
    )
    seed: int = setting(0, "of weights, order, crops and dropped paths", at_least=0)
    device: str = setting(
        "auto", "auto, cuda, mps or cpu", choices=("auto", "cuda", "mps", "cpu"), quiet=True
    )
    precision: str = setting(
        "auto",
        "auto, fp32, bf16 or fp16 (V100, T4); auto: bf16 where it is faster",
        choices=("auto", "fp32", "bf16", "fp16"),
    )
    compile: str = setting(
        "auto",
        "torch.compile of the blocks: auto (on a GPU), true or false",
        choices=("auto", "true", "false"),
    )
    cuda_graph: bool = setting(
        False,
        "launch the whole step at once, as a CUDA graph; for one process, adamw, fp32 or bf16",
        quiet=True,
    )
    patience: float = setting(
        30.0,
        "minutes that one of several processes waits for another before it gives up",
        above=0,
        quiet=True,
    )
    tensorboard: bool = setting(
        False, "write log.txt's numbers for TensorBoard too, each epoch", quiet=True
    )
    log_every: int = setting(
        10,
        "steps between two looks at the loss; for each the CPU waits for the GPU",
        at_least=1,
        quiet=True,
    )
    knn_every: int = setting(
        5, "epochs between k-NN evaluations of teacher and student; 0: never", at_least=0
    )
    knn_images: int = setting(
        5000, "at most so many train images and as many test images for k-NN", at_least=1
    )
    eval_size: int = setting(
        224, "pixels of the evaluation's centre crop", at_least=1, at_most=4096
    )
    eval_crop: float = setting(
        0.875, "its fraction of the resized image's side", above=0, at_most=1
    )

    @property
    def width(self) -> int:
        """D, the numbers of a token: --precision auto times products of it. A convnet: ViT-S's."""
        return VITS.get(self.arch, VITS["vit_small"])


# what the authors' long runs share, most of them or all
_AUTHORS = dict(
    precision="fp32",
    epochs=800,
    teacher_temp=0.07,
    warmup_teacher_temp_epochs=50,
    local_crops_number=10,
)
_VIT_S = _AUTHORS | dict(warmup_teacher_temp_epochs=30, norm_last_layer=False)
_QUARTER_SCALES = dict(global_crops_scale=(0.25, 1.0), local_crops_scale=(0.05, 0.25))
_VIT_B = dict(**_AUTHORS, **_QUARTER_SCALES, arch="vit_base", freeze_last_layer=3, min_lr=2e-6)
# What our own runs on two CPU cores share: the network, and what small data wants. The paper's ViTs
# have no batch normalisation in the head.
_NANO = dict(
    arch="vit_nano",
    patch_size=8,
    init_std=0.07,
    drop_path_rate=0.0,
    use_bn_in_head=True,
    momentum_teacher=0.99,
    momentum_teacher_end=0.99,  # in a few thousand steps a rising one would stop the teacher early
    local_crops_number=4,
    global_crops_scale=(0.5, 1.0),
    blur=(0.0, 0.0, 0.0),
    solarize=0.0,
    compile="false",  # on a GPU the crops are the limit: photos gained 3 %, after 14 s of compiling
)

# The embedded images, 4,000 to train on. What the presets with them share.
_CREATURES = _NANO | dict(
    head_hidden_dim=256,
    warmup_teacher_temp=0.02,
    teacher_temp=0.02,
    batch_size_per_gpu=32,
    lr=0.008,
    global_crops_size=48,
    local_crops_size=24,
    local_crops_scale=(0.25, 0.8),
    color_jitter=(0.4, 0.4, 0.2, 0.5),
    knn_images=1000,
    eval_size=64,
    eval_crop=1.0,
)

PRESETS = {
    # On two idle CPU cores, five minutes: far above the untrained network and raw pixels.
    "demo": _CREATURES
    | dict(
        out_dim=1024,
        # in so few steps the release's decay changes the initial weights little, and most heads
        # attend to a few patches of the creature (docs/results.md)
        weight_decay=2.0,
        weight_decay_end=2.0,
        epochs=14,
        warmup_epochs=2,
        knn_every=4,
        output_dir="runs/demo",
    ),
    # Two minutes, for the class: enough to see the collapses.
    "lab": _CREATURES
    | dict(out_dim=256, epochs=4, warmup_epochs=1.0, knn_every=1, output_dir="runs/lab"),
    # Photographs of your own, at 64 pixels, on two CPU cores: about an hour for 10,000 images or
    # fewer, in proportion for more.
    "photos": _NANO
    | dict(
        out_dim=4096,
        head_hidden_dim=512,
        warmup_teacher_temp=0.03,
        warmup_teacher_temp_epochs=10,
        epoch_images=10_000,
        epochs=50,
        lr=0.003,
        warmup_epochs=3,
        global_crops_size=64,
        local_crops_size=32,
        # with these views k-NN is higher in so few epochs than with the paper's (docs/log.md)
        local_crops_scale=(0.2, 0.5),
        eval_size=72,  # crops show things larger than the whole image does
        output_dir="runs/photos",
    ),
    # A few thousand images of your own on one machine: one GPU, an hour or two; a CPU, overnight.
    "small": dict(
        arch="vit_tiny",
        out_dim=4096,
        momentum_teacher=0.99,
        warmup_teacher_temp=0.02,
        teacher_temp=0.04,
        warmup_teacher_temp_epochs=30,
        epochs=300,
        weight_decay_end=0.2,
        drop_path_rate=0.0,
        knn_every=10,
    ),
    # Imagenette (--dataset imagenette): the best published run of DINO on it, 128 images a step on
    # one A100, under 24 hours: 83.8 % k-NN, 86.1 % linear. Its rate of 5e-4 is read as that of the
    # step, so per 256 images it is twice that. The epochs of the temperature's warm-up are the
    # paper's; what is not named here was not published, and has the release's default.
    "imagenette": dict(
        epochs=200,
        batch_size_per_gpu=128,
        local_crops_number=6,
        lr=0.001,
        teacher_temp=0.07,
        warmup_teacher_temp_epochs=30,
        knn_every=10,
    ),
    # All of ImageNet, below: the arguments of the authors' runs, and what these reached with frozen
    # features (Table 2; vanilla's are of the release). A preset says the images of one GPU; the
    # learning rate follows the images of a step, so other numbers of GPUs are near it. These runs
    # were in fp32; --precision auto is faster. Hours are of V100s. Table 8 measured ViT-S/16; the
    # GPU-hours of the others are estimates, from the speeds in Table 1.
    #
    # The release's defaults. 8 GPUs, 512 images a step, 1.75 days: 69.3 % k-NN, 74.0 % linear.
    "vanilla": {},
    # 16 GPUs, 1024 images a step: 74.5 % k-NN, 77.0 % linear. 300 epochs took 72.6 hours and
    # 15.4 GiB a GPU, so 800 took 3,100 GPU-hours.
    "vits16": dict(**_VIT_S, **_QUARTER_SCALES, clip_grad=0.0, min_lr=1e-5),
    # 64 GPUs of 32 GB, 1024 images a step: 78.3 % k-NN, 79.7 % linear. 17,000 GPU-hours.
    "vits8": dict(**_VIT_S, patch_size=8, batch_size_per_gpu=16),
    # 32 GPUs, 1024 images a step: 76.1 % k-NN, 78.2 % linear. 5,000 GPU-hours.
    "vitb16": _VIT_B | dict(epochs=400, batch_size_per_gpu=32, lr=0.00075, clip_grad=0.3),
    # How many GPUs is not known: 77.4 % k-NN, 80.1 % linear. 19,000 GPU-hours.
    "vitb8": _VIT_B
    | dict(patch_size=8, epochs=300, batch_size_per_gpu=6, warmup_teacher_temp=0.03),
    # 80 GPUs, 4080 images a step: 67.5 % k-NN, 75.3 % linear. For fewer images a step the release
    # advises --optimizer sgd --lr 0.03 --weight_decay 1e-4 --weight_decay_end 1e-4.
    "resnet50": _AUTHORS
    | dict(
        arch="resnet50",
        optimizer="lars",
        batch_size_per_gpu=51,
        lr=0.3,
        min_lr=0.0048,
        weight_decay=1e-6,
        weight_decay_end=1e-6,
        clip_grad=0.0,
        out_dim=60000,
        use_bn_in_head=True,
        local_crops_number=6,
        global_crops_scale=(0.14, 1.0),
        local_crops_scale=(0.05, 0.14),
    ),
}


def marked(kind: type[Settings], mark: str) -> list[str]:
    """Return the names of the settings that have this mark: fixed or quiet."""
    return [one.name for one in fields(kind) if one.metadata.get(mark)]


def written(value: Any) -> str:
    """Return a value as one types it on the command line."""
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return str(value)


def make_parser(kind: type[Settings]) -> CommandLine:
    """Return a parser with one flag for each setting; it holds no defaults."""
    parser = CommandLine(
        "Train DINO. Without --data_path on the embedded images, else with the paper's recipe.\n"
        f"Presets: {', '.join(PRESETS)}; each explained in settings.py.\n"
        "In brackets the defaults, which the preset changes and single flags override."
    )
    for one in fields(kind):
        value_type = type(one.default)
        options = {"type": value_type, "metavar": value_type.__name__}
        if value_type is bool:  # --use_bn_in_head alone means true
            options |= {"type": true_or_false, "nargs": "?", "const": True}
        if value_type is tuple:
            options |= {"type": float, "metavar": "float", "nargs": len(one.default)}

        text = one.metadata["help"]
        if one.default != "":
            text += f" [{written(one.default)}]"
        text = text.replace("%", "%%")  # argparse formats it
        parser.add_argument(f"--{one.name}", default=SUPPRESS, help=text, **options)
    return parser


def default_preset(data_path: str, dataset: str, init_from: str) -> str:
    """Return the name of the recipe for these images and first weights.

    data_path and dataset: where the images are; init_from: the weights; each may be empty.
    """
    if not data_path and not dataset:
        return "demo"
    if re.fullmatch(r"dino_[a-z0-9]+", init_from):  # the authors' networks, by name
        return "vits16"
    if dataset:
        many = dataset == "imagenet"
    else:
        many = has_images(Path(data_path), MANY_IMAGES)
    return "vits16" if many else "photos"


def parse_settings(argv: list[str] | None = None, kind: type[Settings] = Settings) -> Settings:
    """Return checked settings: the defaults, changed by the preset, changed by single flags.

    Raises InputError; a flag that is unknown or no number ends the program with status 2.
    """
    parser = make_parser(kind)
    given = vars(parser.parse_args(argv))
    for name, value in given.items():
        if isinstance(value, list):
            given[name] = tuple(value)
    given.pop("local_rank", None)  # the environment says it
    if "arch" in given:
        given["arch"] = given["arch"].replace("deit_", "vit_")  # the release's older names

    preset = given.get("preset")
    if not preset:
        preset = default_preset(
            given.get("data_path", ""), given.get("dataset", ""), given.get("init_from", "")
        )
    if preset not in PRESETS:
        parser.error(f"--preset {preset} is unknown: choose one of {', '.join(PRESETS)}")

    settings = kind(**{**PRESETS[preset], **given, "preset": preset})
    falls = settings.momentum_teacher > settings.momentum_teacher_end
    if falls and "momentum_teacher_end" not in given:
        # no rise leads from a start above the preset's end to it: rise to 1, as in the release
        settings.momentum_teacher_end = 1.0
    check(settings)
    return settings


def refuse(settings: Settings, name: str, reason: str) -> None:
    """Raise InputError: the flag, its value, and what to do."""
    raise InputError(f"--{name} {written(getattr(settings, name))} {reason}")


def check(settings: Settings) -> None:
    """Raise InputError for a setting out of range; files and devices are not looked at."""
    for one in fields(settings):
        check_limits(settings, one.name, getattr(settings, one.name), one.metadata)

    for name in ("global_crops_scale", "local_crops_scale"):
        low, high = getattr(settings, name)
        if low > high:
            refuse(settings, name, "must be two fractions of the area, the lower one first")
    if settings.color_jitter[3] > 0.5:
        refuse(settings, "color_jitter", "must have a hue of at most 0.5")
    start, end = settings.momentum_teacher, settings.momentum_teacher_end
    if end < start:
        why = f"is below --momentum_teacher {start}, and the teacher's momentum rises"
        refuse(settings, "momentum_teacher_end", f"{why}: take 1, or {start} to keep it")
    too_long = []
    without = []
    for name in ("warmup_epochs", "warmup_teacher_temp_epochs"):
        value = getattr(settings, name)
        if value > settings.epochs:
            too_long.append(f"--{name} {value:g}")
            without.append(f"--{name} 0")
    if too_long:
        warmups = " and ".join(too_long)
        fix = " ".join(without)
        refuse(settings, "epochs", f"is shorter than {warmups}: pass {fix}, or more --epochs")

    if settings.tensorboard and not find_spec("tensorboard"):
        refuse(settings, "tensorboard", "needs a package: pip install tensorboard, or leave it out")

    if settings.arch not in VITS:
        if settings.num_heads:
            refuse(settings, "num_heads", "is for ViTs: leave it out")
        if settings.batch_size_per_gpu < 2:
            refuse(settings, "batch_size_per_gpu", "leaves batch normalisation one value: take 2")
        return
    patch = settings.patch_size
    for name in ("global_crops_size", "local_crops_size", "eval_size"):
        size = getattr(settings, name)
        if size % patch:
            nearest = max(patch, round(size / patch) * patch)
            refuse(settings, name, f"is no multiple of --patch_size {patch}: take {nearest}")


def check_limits(settings: Settings, name: str, value: Any, metadata: dict) -> None:
    """Raise InputError if one of the setting's numbers is out of its limits, or no choice."""
    choices = metadata.get("choices")
    if choices and value not in choices:
        refuse(settings, name, f"is unknown: choose one of {', '.join(choices)}")
    if isinstance(value, (str, bool)):
        return

    numbers = value if isinstance(value, tuple) else (value,)
    for number in numbers:
        if not math.isfinite(number):
            refuse(settings, name, "must be finite")
        for limit, bound in metadata.items():
            if limit in LIMITS and not LIMITS[limit](number, bound):
                refuse(settings, name, f"must be {limit.replace('_', ' ')} {bound}")
