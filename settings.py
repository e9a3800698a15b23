"""Every setting of a training as one commented dataclass, which is also the command line, and the presets.

Names and defaults are the release's. A setting's first comment becomes its --help text. The presets below are
changes to the defaults; single flags override a preset.
"""
import dataclasses
import inspect
import math
import re
from argparse import SUPPRESS
from dataclasses import dataclass
from functools import cache

from runtime.augment import IMAGENET_MEAN, IMAGENET_STD
from runtime.commandline import CommandLine, InputError, true_or_false


@dataclass
class Settings:
    """All that a training can be told: views in pixels, scales as shares of the area, warm-ups in epochs."""

    # -- data
    # a recipe by name: demo, small, vits16, vits8, vitb16, vitb8, resnet50; by default demo without data and
    # vits16 with data
    preset: str = ""
    # a folder of class folders, of images, or with train/ and val/; without it the embedded images
    data_path: str = ""
    # one of torchvision's instead, kept under --data_path: cifar10, stl10, imagenette, flowers102, oxford_pets
    # ...
    dataset: str = ""
    download: bool = False  # fetch --dataset over the network if it is not there
    skip_bad_images: bool = False  # read every image once at the start and leave out those that cannot be read
    # processes that decode and augment; 0: the training's own; -1: one a core, at most 10, and without a GPU one in
    # four cores, the others being the network's: none on a laptop's two
    num_workers: int = -1
    # -- network
    arch: str = "vit_small"  # vit_nano, vit_tiny, vit_small, vit_base, or a convnet of torchvision such as resnet50
    patch_size: int = 16  # pixels; smaller patches are better and slower (Fig. 5)
    drop_path_rate: float = 0.1  # stochastic depth of the student
    num_heads: int = 0  # of the ViT's attention; 0: the arch's own
    init_std: float = 0.02  # width of the initial weights; narrow networks and short runs want more, about 0.06
    out_dim: int = 65536  # K, the number of prototypes; small data wants fewer, 1024 to 4096
    head_hidden_dim: int = 2048  # width of the head's hidden layers
    head_bottleneck_dim: int = 256  # width of its l2-normalised bottleneck
    use_bn_in_head: bool = False  # batch normalisation in the head; the paper does without
    head_nlayers: int = 3  # layers of the head before the prototypes (the paper counts these too: 4)
    head_activation: str = "gelu"  # gelu or relu
    head_l2_bottleneck: bool = True  # false: hidden layers and a linear one, neither bottleneck nor l2 norm
    # freeze the prototypes' gain at 1; false trains a little better where it is stable (ViT-S)
    norm_last_layer: bool = True
    # -- loss and teacher
    loss: str = "cross_entropy"  # cross_entropy, mse (BYOL's) or infonce (MoCo's, at --student_temp)
    # what keeps the teacher from collapse: center, or shares of the batch by sinkhorn or batch_softmax
    centering: str = "center"
    predictor: bool = False  # two more layers on the student's projection, as BYOL has
    queue_length: int = 65536  # keys that infonce compares with; small data wants fewer than it has images
    # momentum (the average), previous_epoch, previous_iteration or student (a copy): the teachers of Fig. 6
    teacher: str = "momentum"
    student_temp: float = 0.1  # the student's softmax temperature
    # the teacher's at the start; too low is unstable: lower it if the loss does not fall
    warmup_teacher_temp: float = 0.04
    # the teacher's after its warm-up; above 0.07 training breaks; 0.1 = student_temp: no sharpening
    teacher_temp: float = 0.04
    warmup_teacher_temp_epochs: int = 0  # epochs of its warm-up (30 in the paper)
    center_momentum: float = 0.9  # of the center's average; 1 keeps it at zero: no centering, to see the collapse
    # of the teacher's average, rising to 1; small DATA wants it lower (0.99), a small BATCH higher (0.9995)
    momentum_teacher: float = 0.996
    # -- optimisation
    optimizer: str = "adamw"  # adamw (ViT), sgd (convnets) or lars (convnets, large batches)
    epochs: int = 100  # passes over the data
    batch_size_per_gpu: int = 64  # images a process and a micro-batch
    accumulate: int = 1  # micro-batches a step; center, teacher and schedules move once a step
    lr: float = 0.0005  # at the end of the warm-up, per 256 images of a step: scaled by (images a step) / 256
    warmup_epochs: int = 10  # epochs of the learning rate's linear warm-up
    min_lr: float = 1e-6  # at the end of its cosine
    weight_decay: float = 0.04  # its value at the start of its cosine
    weight_decay_end: float = 0.4  # and at the end
    clip_grad: float = 3.0  # largest gradient norm of each parameter tensor by itself; 0: no clipping
    freeze_last_layer: int = 1  # epochs during which the prototypes get no gradient; more if the loss does not fall
    # -- crops
    global_crops_size: int = 224  # pixels
    local_crops_size: int = 96  # pixels
    global_crops_scale: tuple[float, float] = (0.4, 1.0)  # shares of the image's area; without locals use 0.14 1
    local_crops_scale: tuple[float, float] = (0.05, 0.4)  # shares of the image's area
    local_crops_number: int = 8  # local views an image; 0: no multi-crop
    # brightness, contrast, saturation, hue (0.5: the whole circle)
    color_jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    blur: tuple[float, float, float] = (1.0, 0.1, 0.5)  # chance of a Gaussian blur on global 1, global 2 and each local
    solarize: float = 0.2  # chance of solarisation on global 2
    mean: tuple[float, float, float] = IMAGENET_MEAN  # subtracted from pixels in 0 ... 1
    std: tuple[float, float, float] = IMAGENET_STD  # and then divided by
    # -- the run
    # gets checkpoint.pth, log.txt, curves.png, attention.png; a run found there is continued
    output_dir: str = "runs/default"
    init_from: str = ""  # start from a checkpoint's weights only, with a fresh optimiser and schedules
    saveckp_freq: int = 20  # keep checkpoint0020.pth and so on every so many epochs; 0: only checkpoint.pth
    seed: int = 0  # of weights, order, crops and dropped paths
    device: str = "auto"  # auto, cuda, mps or cpu
    precision: str = "auto"  # auto, fp32 or bf16; auto: bf16 where the hardware multiplies it
    compile: str = "auto"  # torch.compile of the blocks: auto (on a GPU), true or false
    patience: float = 30.0  # minutes that one of several processes waits for another before it gives up
    knn_every: int = 5  # epochs between k-NN evaluations of teacher and student; 0: never
    knn_images: int = 5000  # at most so many images vote, and at most so many are asked
    eval_size: int = 224  # pixels of the evaluation's centre crop
    eval_crop: float = 0.875  # its share of the resized image's side


_VIT = dict(warmup_teacher_temp=0.04, teacher_temp=0.07, warmup_teacher_temp_epochs=30, local_crops_number=10)
PRESETS = {
    # The embedded images on two CPU cores, ten minutes: far above the untrained network and raw pixels.
    "demo": dict(arch="vit_nano", patch_size=8, init_std=0.07, drop_path_rate=0.0, out_dim=256, head_hidden_dim=256,
                 use_bn_in_head=True, warmup_teacher_temp=0.02, teacher_temp=0.02, momentum_teacher=0.99, epochs=36,
                 batch_size_per_gpu=32, lr=0.008, warmup_epochs=2, global_crops_size=48, local_crops_size=24,
                 global_crops_scale=(0.5, 1.0), local_crops_scale=(0.25, 0.8), local_crops_number=4,
                 color_jitter=(0.4, 0.4, 0.2, 0.5), blur=(0.0, 0.0, 0.0), solarize=0.0,
                 knn_every=4, knn_images=1000, eval_size=64, eval_crop=1.0, output_dir="runs/demo"),
    # A few thousand images of your own on one machine: one GPU, an hour or two; a CPU, overnight.
    "small": dict(arch="vit_tiny", out_dim=4096, momentum_teacher=0.99, warmup_teacher_temp=0.02, teacher_temp=0.04,
                  warmup_teacher_temp_epochs=30, epochs=300, weight_decay_end=0.2, drop_path_rate=0.0, knn_every=10),
    # For all of ImageNet below: the paper's steps are of 1024 images (16 GPUs of 64, or --accumulate 2 on 8), and its
    # numbers (Table 2) come from long runs: set --epochs 300 to 800. Hours are from V100 speeds (Tables 1 and 8).
    # 16 V100: 73 hours for 300 epochs, 76.1 % linear; the longest run gives 77.0 % linear, 74.5 % k-NN.
    "vits16": dict(**_VIT, norm_last_layer=False, global_crops_scale=(0.25, 1.0), local_crops_scale=(0.05, 0.25)),
    # 16 V100 of 32 GB: 5.6 times the hours of vits16; 79.7 % linear, 78.3 % k-NN.
    "vits8": dict(**_VIT, patch_size=8, norm_last_layer=False, global_crops_scale=(0.25, 1.0),
                  local_crops_scale=(0.05, 0.25)),
    # 16 V100 of 32 GB: 3.2 times the hours of vits16; 78.2 % linear, 76.1 % k-NN.
    "vitb16": dict(**_VIT, arch="vit_base", global_crops_scale=(0.25, 1.0), local_crops_scale=(0.05, 0.25)),
    # 32 V100 of 32 GB or more: 16 times the work of vits16; 80.1 % linear, 77.4 % k-NN.
    "vitb8": dict(**_VIT, arch="vit_base", patch_size=8, global_crops_scale=(0.25, 1.0),
                  local_crops_scale=(0.05, 0.25)),
    # 16 V100: 0.8 times the hours of vits16; 75.3 % linear, 67.5 % k-NN.
    "resnet50": dict(arch="resnet50", optimizer="sgd", lr=0.03, weight_decay=1e-4, weight_decay_end=1e-4,
                     global_crops_scale=(0.14, 1.0), local_crops_scale=(0.05, 0.14)),
}


@cache  # the ablations read hundreds of command lines
def _help_texts() -> dict[str, str]:
    """Each setting's comment in the source above: behind it, or in the lines before it."""
    texts, before = {}, []
    for line in inspect.getsource(Settings).splitlines():
        setting = re.match(r"    (\w+): .*?(?:  # (.*))?$", line)
        if setting:
            texts[setting[1]] = " ".join([*before, setting[2] or ""]).strip()
        before = [*before, line.strip("# ")] if line.startswith("    # ") and "# --" not in line else []
    return texts


def parse_settings(argv: list[str] | None = None) -> Settings:
    """The command line -> checked settings: the defaults, changed by the preset, changed by single flags."""
    parser = CommandLine("Train DINO. Without --data_path on the embedded images, else with the paper's recipe.\n"
                         f"Presets: {', '.join(PRESETS)}; each explained in settings.py.\nIn brackets the "
                         "defaults, which the preset changes and single flags override.")
    texts = _help_texts()
    for field in dataclasses.fields(Settings):
        default, many = field.default, isinstance(field.default, tuple)
        kind = true_or_false if isinstance(default, bool) else type(default[0] if many else default)
        shown = " ".join(map(str, default)) if many else default
        shown = f" [{shown}]" if shown != "" else ""
        switch = isinstance(default, bool) or field.name == "compile"  # alone it means true
        parser.add_argument(f"--{field.name}", type=kind, nargs=len(default) if many else "?" if switch else None,
                            const=kind("true") if switch else None, metavar=kind.__name__, default=SUPPRESS,
                            help=f"{texts[field.name]}{shown}".replace("%", "%%"))
    given = vars(parser.parse_args(argv))
    preset = given.get("preset") or ("vits16" if given.get("data_path") or given.get("dataset") else "demo")
    if preset not in PRESETS:
        parser.error(f"--preset {preset} is unknown: choose one of {', '.join(PRESETS)}")
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    settings = Settings(**{**PRESETS[preset], **given, "preset": preset})
    check(settings)
    return settings


def check(settings: Settings) -> None:
    """Raise InputError on a setting out of range; nothing here looks at files or devices."""

    def require(holds: bool, flag: str, mend: str) -> None:
        if not holds:
            value = getattr(settings, flag)
            shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
            raise InputError(f"--{flag} {shown} {mend}")

    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        numbers = value if isinstance(value, tuple) else (value,)
        require(all(math.isfinite(n) for n in numbers if isinstance(n, float)), field.name, "must be finite")
    require(settings.head_nlayers >= settings.head_l2_bottleneck, "head_nlayers", "must be at least 1 (0 without the "
            "l2 bottleneck)")
    for flag in ("patch_size", "queue_length", "head_hidden_dim", "head_bottleneck_dim", "epochs", "batch_size_per_gpu",
                 "accumulate", "global_crops_size", "local_crops_size", "knn_images", "eval_size"):
        require(getattr(settings, flag) >= 1, flag, "must be at least 1")
    for flag in ("num_heads", "warmup_teacher_temp_epochs", "warmup_epochs", "weight_decay", "weight_decay_end",
                 "clip_grad", "lr", "freeze_last_layer", "local_crops_number", "saveckp_freq", "knn_every", "seed",
                 "min_lr"):
        require(getattr(settings, flag) >= 0, flag, "must not be negative")
    for flag in ("student_temp", "warmup_teacher_temp", "teacher_temp", "init_std", "patience"):
        require(getattr(settings, flag) > 0, flag, "must be above 0")
    for flag in ("center_momentum", "momentum_teacher", "solarize", "blur"):
        value = getattr(settings, flag)
        in_range = all(0 <= share <= 1 for share in (value if isinstance(value, tuple) else (value,)))
        require(in_range, flag, "must lie in 0 ... 1")
    for flag in ("global_crops_scale", "local_crops_scale"):
        low, high = getattr(settings, flag)
        require(0 < low <= high <= 1, flag, "must be two shares of the area, 0 < low <= high <= 1")
    require(settings.centering == "center" or settings.loss == "cross_entropy", "centering",
            "is for --loss cross_entropy: leave it out")
    require(settings.seed < 2 ** 63, "seed", "must be below 2^63")
    require(settings.out_dim >= 2, "out_dim", "must be at least 2 prototypes")
    require(0 <= settings.drop_path_rate < 1, "drop_path_rate", "must lie in 0 ... 1, below 1")
    require(0 < settings.eval_crop <= 1, "eval_crop", "must lie in 0 ... 1, above 0")
    require(min(settings.std) > 0, "std", "must be above 0")
    require(min(settings.color_jitter) >= 0 and settings.color_jitter[3] <= 0.5, "color_jitter",
            "must not be negative, and its hue at most 0.5")
    require(settings.num_workers >= -1, "num_workers", "must be a number of processes, or -1")
    for flag, choices in dict(optimizer=("adamw", "sgd", "lars"), device=("auto", "cuda", "mps", "cpu"),
                              precision=("auto", "fp32", "bf16"), compile=("auto", "true", "false"),
                              head_activation=("gelu", "relu"), loss=("cross_entropy", "mse", "infonce"),
                              centering=("center", "sinkhorn", "batch_softmax"),
                              teacher=("momentum", "previous_epoch", "previous_iteration", "student")).items():
        require(getattr(settings, flag) in choices, flag, f"is unknown: choose one of {', '.join(choices)}")
    for flag in ("warmup_epochs", "warmup_teacher_temp_epochs"):
        require(getattr(settings, flag) <= settings.epochs, flag,
                f"is longer than the run of --epochs {settings.epochs}: give a shorter --{flag} too, or more --epochs")
    from training.backbone import (  # not above, since it loads torch: --help and the checks so far answer at once
        VITS,
        is_arch,
    )

    require(is_arch(settings.arch), "arch", f"is unknown: choose one of {', '.join(VITS)}, or a convnet of torchvision "
            "such as resnet50")
    require(settings.arch in VITS or not settings.num_heads, "num_heads", "is for ViTs: leave it out")
    if settings.arch in VITS:
        for flag in ("global_crops_size", "local_crops_size", "eval_size"):
            size, patch = getattr(settings, flag), settings.patch_size
            require(size % patch == 0, flag, f"is no multiple of --patch_size {patch}: "
                    f"take {max(patch, round(size / patch) * patch)}")
