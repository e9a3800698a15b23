# The source of dino.ipynb. After a change: python -m classroom.notebook
# It runs all cells, and writes them with what they print and draw; some minutes on two cores.
# ruff: noqa: E402

# %% [markdown]
# # DINO in one sitting
#
# A student network learns to predict a teacher network's output for another crop of the same
# image. Neither sees a label ([Caron et al. 2021](https://arxiv.org/abs/2104.14294)). The cells
# call the files of the repository: open the file that a cell imports, and read it beside the cell.
#
# Run the cells from top to bottom, and answer each question *before* you run its cell. All together
# takes some minutes on two cores, the training two of them. No GPU and no data are needed.

# %%
import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = "https://github.com/OWNER/educational-dino"  # for Colab: your copy's address

clone = Path("educational-dino")
places = [place for place in (Path("."), Path(".."), clone) if (place / "train.py").exists()]
if not places:
    subprocess.run(["git", "clone", "--depth", "1", REPOSITORY, clone], check=True)
    requirements = clone / "requirements.txt"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "-r", requirements], check=True)
    places = [clone]
os.chdir(places[0])
sys.path.insert(0, os.getcwd())  # so that import finds train.py and the others

# %% [markdown]
# ## 1. Images
# Ten kinds of creature, drawn by the program; colours, size, place and angle say nothing about the
# kind. **Question:** which part of an image would you look at to name the creature?

# %%
import matplotlib.pyplot as plt
import torch

from data import at_most, open_images
from runtime.panels import as_pixels

FOLDER = ""  # or the path of a folder with images of your own
IMAGES = 4000  # to train on: with fewer it is quicker, and learns less

train_images, test_images = open_images(FOLDER)
test_images = at_most(test_images or train_images, 1000)
train_images = at_most(train_images, IMAGES)


def pixels(images, index):
    """Return an image as it is drawn: (H, W, 3)."""
    image, _label = images[index]
    return as_pixels(image)


def show(rows, titles=(), inches=1.0):
    """Draw rows of images (H, W, 3), or of maps (H, W); titles stand above the first row."""
    columns = max(len(row) for row in rows)
    size = (inches * columns, inches * len(rows) + 0.3)
    figure = plt.figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for line, row in zip(grid, rows):
        for axes, image in zip(line, row):
            axes.imshow(image)
    for axes, title in zip(grid[0], titles):
        axes.set_title(title, fontsize=8)
    plt.show()


print(len(train_images), "train images,", len(test_images), "test images")
names = []
if test_images.labels is not None:  # for your eyes: the training does not see them
    names = [test_images.classes[label] for label in test_images.labels[:10]]
show([[pixels(test_images, index) for index in range(10)]], names)

# %% [markdown]
# ## 2. Crops
# `multicrop.py` cuts two large (global) and several small (local) views from an image, and changes
# their colours (Sec. 3.1). **Question:** in which views can you still recognise the creature, and
# what is the same in all of them?

# %%
from features import EvaluationView
from settings import parse_settings
from training.inputs import make_multicrop
from training.report import unnormalised

recipe = "--preset lab --epochs 6"
settings = parse_settings(recipe.split())  # as: python train.py --preset lab ...
view = EvaluationView(settings.eval_size, settings.eval_crop)  # a whole image, for evaluations

torch.manual_seed(settings.seed)
multicrop = make_multicrop(settings)
rows = []
for index in (0, 3):
    crops = multicrop(test_images[index][0])
    rows.append([pixels(test_images, index)] + [unnormalised(crop, view) for crop in crops])
show(rows, ["image", "global 1", "global 2", "local 1", "local 2", "local 3", "local 4"])

# %% [markdown]
# ## 3. Student and teacher
# Both are a Vision Transformer (`vit.py`) with a head (`head.py`) that gives each image K numbers,
# the logits, one for each *prototype*. **Question:** how do the two networks differ before the
# first step, and which of them gets gradients?

# %%
from runtime.hardware import World, choose_dtype
from settings import VITS
from training.run_state import start_run

cpu = torch.device("cpu")
dtype, _ = choose_dtype(settings.precision, cpu, VITS[settings.arch])  # bf16 where it is faster
world = World(rank=0, size=1, device=cpu, dtype=dtype)  # one process
untrained = start_run(settings, world)  # student, teacher, loss and optimizer

for name, network in (("student", untrained.student), ("teacher", untrained.teacher)):
    parameters = list(network.parameters())
    numbers = sum(parameter.numel() for parameter in parameters)
    learning = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    print(f"{name}: {numbers:,} parameters, {learning:,} of them get gradients")

# %% [markdown]
# ## 4. Centering and sharpening
# The teacher's logits g become probabilities by softmax((g - c) / temperature): Eq. 1 with the
# center c, as Algorithm 1 has it (Sec. 3.1 writes + c). Below they are drawn without and with c, at
# the student's temperature (0.1) and at the teacher's.
# **Question:** of centering and sharpening one makes the teacher sure of a single image, the other
# keeps it from giving all images the same answer. Which is which, and what happens with one alone?

# %%
from loss import DINOLoss, entropy

views = [view(test_images[index][0]) for index in range(len(test_images))]
views = torch.stack(views)  # (n, 3, S, S)
with torch.no_grad():
    logits = untrained.teacher([views])  # (n, K)

no_center = DINOLoss(settings.out_dim)  # a loss starts with the center 0
centered = DINOLoss(settings.out_dim, center_momentum=0)
centered.update_center(logits)  # Eq. 4, with m = 0: the mean of these logits

figure, grid = plt.subplots(2, 2, figsize=(10, 5), sharex=True, layout="constrained")
for line, loss, name in zip(grid, (no_center, centered), ("no center", "centered")):
    for axes, temperature in zip(line, (settings.student_temp, settings.teacher_temp)):
        probs = loss.teacher_probs(logits, temperature)
        mean = probs.mean(dim=0, keepdim=True)
        axes.plot(probs[0], label="the first image", linewidth=1)
        axes.plot(mean[0], label="mean of all images", linewidth=1)
        title = f"{name}, temperature {temperature}\n"
        title += f"entropy of an image {entropy(probs):.2f}, of the mean {entropy(mean):.2f} nats"
        axes.set_title(title, fontsize=10)
for axes in grid[1]:
    axes.set_xlabel("prototype")
for axes in grid[:, 0]:
    axes.set_ylabel("probability")
grid[0, 0].legend()
plt.show()

# %% [markdown]
# ## 5. Training
# The loop of `train.py`, without checkpoints: each call of `train_step` is one step of Algorithm 1.
# The loss is the teacher's entropy plus the KL divergence from teacher to student (Eq. 5), and both
# are drawn while it runs. **Question:** in a collapse the KL goes to 0 and the entropy to 0 or to
# ln K. What do you expect of a healthy training? Draw both curves first.

# %%
import math

from runtime.threads import FreeCores
from train import schedules, set_schedules, train_step
from training.inputs import make_loader

try:
    from IPython.display import clear_output
except ImportError:  # plain Python: one figure after the other

    def clear_output(wait):
        pass


def draw_curves(metrics, title):
    """Draw loss, entropy and KL of all steps, in place of the last drawing."""
    clear_output(wait=True)
    plt.figure(figsize=(8, 3), layout="constrained")
    curves = zip(*metrics)  # a step's three numbers become three curves
    for curve, name in zip(curves, ("loss", "entropy of the teacher", "KL")):
        plt.plot(curve, label=name, linewidth=1)
    plt.axhline(math.log(settings.out_dim), color="grey", linestyle=":", label="ln K")
    plt.xlabel("step")
    plt.ylabel("nats")
    plt.ylim(0, None)
    plt.title(title, fontsize=10)
    plt.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    plt.show()


# two minutes are often too short for local crops (lab 7 in classroom/README.md)
settings.local_crops_number = 0
settings.global_crops_scale = (0.25, 1.0)  # without them the global crops have to differ more

run = start_run(settings, world)  # the same weights as `untrained`, from the same seed
loader, batches = make_loader(train_images, settings, world)
free_cores = FreeCores(world.device, loader.num_workers)
total = settings.epochs * batches.steps
metrics = []  # of each step: loss, entropy, KL

for epoch in range(settings.epochs):
    batches.epoch = epoch  # other crops, in another order
    for crops in loader:
        free_cores.take()  # the network's threads, on a CPU that other programs use too
        now = schedules(settings, len(metrics), batches.steps, batches.images_per_step)
        set_schedules(run.optimizer, now)
        measured = train_step(
            run.student, run.teacher, run.dino_loss, run.optimizer, [crops], now, settings, world
        )
        metrics.append(measured[:3].tolist())  # without the gradient's norm
        step = len(metrics)
        if step % 50 == 0 or step == total:
            draw_curves(metrics, f"step {step} of {total}")

# %% [markdown]
# ## 6. Where [CLS] looks
# The attention of the [CLS] token in the last block, for each head (Fig. 1 and 3), before and after
# the training. **Question:** nobody said where the creature is. Do all heads look at the same part
# of it?

# %%
from attention import cls_attention, mass_on_object
from training.evaluation import fit_to_patches
from visualize_attention import attention_of

before = untrained.teacher.backbone.eval()
after = run.teacher.backbone.eval()
flags = vars(settings)  # the colours' mean and standard deviation

heads = len(attention_of(after, test_images[0][0], flags))
titles = ["image"] + [f"head {h}, before" for h in range(heads)]
titles += [f"head {h}, after" for h in range(heads)]
rows = []
for index in (0, 2, 3, 5, 6):
    # twice the side of the evaluation's view: the maps are twice as fine
    image = fit_to_patches(test_images[index][0], 2 * settings.eval_size, settings.patch_size)
    maps = [*attention_of(before, image, flags), *attention_of(after, image, flags)]
    rows.append([as_pixels(image)] + maps)
show(rows, titles)

if test_images.masks is not None:  # of the embedded images we know where the creature is
    for name, network in (("before", before), ("after", after)):
        on_object = mass_on_object(cls_attention(network, views), test_images.masks)
        print(f"{name}: {100 * on_object.mean():.0f} % of the attention is on the creature")
    print(f"it covers {100 * test_images.masks.float().mean():.0f} % of an image")

# %% [markdown]
# ## 7. Nearest neighbours
# The feature of an image is the backbone's output. Beside each test image are the four train images
# with the largest cosine to it: of the pixels, and of the features before and after the training.
# **Question:** what do neighbours by pixels have in common? And by the trained features?

# %%
from features import (
    LabelledFeatures,
    Pixels,
    extract_features,
    knn_accuracies,
    nearest_neighbours,
)

neighbours = at_most(train_images, 1000)
queries = [0, 1, 2, 3, 4]
rows = [[pixels(test_images, query)] for query in queries]
for name, network in (("pixels", Pixels()), ("before", before), ("after", after)):
    train_features = extract_features(network, neighbours, view, world)
    test_features = extract_features(network, test_images, view, world)
    _, nearest = nearest_neighbours(train_features, test_features, 4)
    for row, query in zip(rows, queries):
        row += [pixels(neighbours, index) for index in nearest[query].tolist()]

    if test_images.labels is not None:  # now we look at labels: the vote of the 20 nearest
        features = LabelledFeatures(
            train_features, neighbours.labels, test_features, test_images.labels
        )
        top1, _ = knn_accuracies(features)[20]
        print(f"{name}: k-NN names {top1:.0f} % of the test images correctly")
show(rows, ["image"] + ["pixels"] * 4 + ["before"] * 4 + ["after"] * 4)

# %% [markdown]
# ## 8. The prototypes
# Each test image has a favourite prototype, to which the teacher gives the largest probability.
# **Question:** how many of the K prototypes are a favourite before the training, and how many after
# it? What would this figure look like after a one-hot collapse?

# %%
from classroom.prototypes import favourites, probabilities

figure, grid = plt.subplots(1, 2, figsize=(10, 2.5), sharey=True, layout="constrained")
for axes, name, one in zip(grid, ("before", "after"), (untrained, run)):
    probs = probabilities(one, views, settings)  # (n, K)
    counts = favourites(probs)  # of how many images each prototype is the favourite
    used = (counts > 0).sum()
    axes.bar(range(settings.out_dim), counts.sort(descending=True).values, width=1)
    axes.set_title(f"{name}: {used} of {settings.out_dim} prototypes are a favourite", fontsize=10)
    axes.set_xlabel("prototypes, the most frequent first")
grid[0].set_ylabel("test images")
plt.show()

# %% [markdown]
# What does one prototype collect? **Question:** is it a kind of creature, a coat, a shape, or
# something else? Try other values of `RANK`.

# %%
RANK = 0  # 0: the most frequent prototype, 1: the next one ...

prototype = counts.argsort(descending=True)[RANK]
collected = (probs.argmax(dim=1) == prototype).nonzero().squeeze(1)
surest = probs[collected, prototype].argsort(descending=True)
collected = collected[surest].tolist()
print(f"prototype {prototype} is the favourite of {len(collected)} test images")
if test_images.labels is not None:
    per_class = test_images.labels[collected].bincount(minlength=len(test_images.classes))
    for label in per_class.argsort(descending=True).tolist()[:5]:
        print(f"{per_class[label]} times {test_images.classes[label]}")
show([[pixels(test_images, index) for index in collected[:10]]])

# %% [markdown]
# ## 9. What is like this patch?
# Choose an image and a point in it: the red frame is the patch at that point. The maps show the
# cosine between its feature and those of all patches, also of other images; blue is the least,
# yellow is 1. The upper row is before the training, the lower one after it. **Question:** what do
# you expect for a patch on the creature, and for one on the ground? Try both.

# %%
from runtime.query import cosine_panels, cosines, query_patches
from visualize_attention import patch_tokens_of

IMAGE = 0
POINT = (0.6, 0.45)  # fractions of the width, from the left, and of the height, from the top

rows = []
for network in (before, after):
    row = []
    for number, index in enumerate([IMAGE, IMAGE + 10, IMAGE + 3, IMAGE + 5]):
        image = fit_to_patches(test_images[index][0], 2 * settings.eval_size, settings.patch_size)
        tokens = patch_tokens_of(network, image, flags)  # (r, c, D)
        patches = []
        if number == 0:
            patches = query_patches(POINT, *tokens.shape[:2])
            feature = tokens[patches[0]].unsqueeze(0)  # (1, D)
            least = cosines(feature, tokens).amin(dim=(1, 2))
        maps = cosines(feature, tokens)  # (1, r, c)
        panels = cosine_panels(as_pixels(image), maps, least, patches, settings.patch_size)
        row += [as_pixels(image), panels[0].image]
    rows.append(row)
show(rows, ["image", "cosine"] * 4, inches=1.5)

# %% [markdown]
# ## Your turn
# - Break it: add `--center_momentum 1` to `recipe` (no centering), or `--teacher_temp 0.1
#   --warmup_teacher_temp 0.1` (no sharpening), and run all cells again. Which collapse is it, and
#   what do the curves, the prototypes and the attention say?
# - Train longer: more `--epochs` in `recipe`.
# - Write the parts yourself: `python -m classroom list` in a terminal shows the exercises.
