"""The race: a budget that is kept, a judge's own images and seeds, no labels, and clear records."""

import json
import re
import signal
from pathlib import Path

import pytest
import torch
from torchvision.transforms.functional import to_pil_image

from classroom import __main__ as commands
from classroom import race
from data import Images
from features import EvaluationView, Pixels, extract, knn_accuracies
from runtime.commandline import InputError
from runtime.creatures import CLASSES, make_creatures
from runtime.flops import flops
from settings import Settings, parse_settings

PAGE = (Path(__file__).parent.parent / "classroom/README.md").read_text(encoding="utf-8")
TRAIN, TEST = 40, 20  # images of a test's judge
TINY = (
    "--patch_size 16 --global_crops_size 32 --local_crops_size 16 --local_crops_number 1 "
    "--eval_size 32 --out_dim 31 --head_hidden_dim 29 --head_bottleneck_dim 7 --drop_path_rate 0 "
    "--batch_size_per_gpu 4 --warmup_epochs 0 --device cpu --precision fp32 --num_workers 0"
).split()
OWN_LOSS = """
from loss import DINOLoss


class Loud(DINOLoss):
    def forward(self, *arguments):
        print("my own loss", self.center.shape[1])
        return super().forward(*arguments)


def make_loss(settings):
    return Loud(settings.out_dim)
"""


def few_creatures(seed: int) -> tuple[Images, Images]:
    drawn = make_creatures(TRAIN + TEST, 32, seed)
    images = Images(drawn.images, drawn.labels, CLASSES, drawn.masks)
    return images.subset(torch.arange(TRAIN)), images.subset(torch.arange(TRAIN, TRAIN + TEST))


@pytest.fixture
def place(tmp_path, monkeypatch, no_report) -> Path:
    """A folder for the runs and the results, and few images."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(race, "draw_images", few_creatures)
    monkeypatch.setattr(race, "RESULTS", tmp_path / "race.jsonl")
    return tmp_path


def enter(*own: str, flags: list[str] = TINY) -> None:
    """python -m classroom race OWN -- FLAGS"""
    commands.main(["race", *own, "--results", "race.jsonl", "--", *flags])


def refusal(capsys, *own: str, flags: list[str] = TINY) -> str:
    """The one line before exit status 2."""
    with pytest.raises(SystemExit) as stopped:
        enter("--track", "embedded", "--name", "a", "--budget", "0.001", *own, flags=flags)
    lines = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and len(lines) == 1, f"one line was wanted: {lines}"
    return lines[0]


def entries(place: Path) -> list[dict]:
    return [json.loads(line) for line in (place / "race.jsonl").read_text().splitlines()]


def test_the_budget_is_kept_and_the_schedules_end_with_it(place, monkeypatch, capsys):
    """23 steps, 10 an epoch at most: 3 epochs of 7, and the last step's rate is near the end."""
    step = flops_of_a_step()
    monkeypatch.setattr(race, "SEEDS", (101, 102))
    budget = 23.5 * step / 1e12
    enter("--track", "embedded", "--name", "a", "--budget", str(budget))
    (line,) = entries(place)
    assert line["spent"] == pytest.approx(21 * step / 1e12, abs=1e-4)
    assert capsys.readouterr().out.count("7 steps of 4 an epoch") == 2
    folders = list((place / "runs/race").iterdir())
    assert len(folders) == 2, "each seed has a fresh folder"
    for folder in folders:
        log = [json.loads(record) for record in (folder / "log.txt").read_text().splitlines()]
        assert [record["epoch"] for record in log] == [-1, 0, 1, 2]
        assert log[-1]["train_lr"] < 0.02 * 0.008 * 4 / 256, "the cosine ends with the budget"


def flops_of_a_step() -> float:
    contest = race.Contest(race.Entry(), few_creatures(0)[0])
    settings = race.read_settings("embedded", TINY)
    with race.hardware.start("cpu", "fp32") as world:
        return 1e12 * contest.cost_of_step("embedded", settings, world)


def test_a_step_is_both_networks_forward_and_the_student_backward():
    """For this network without a head's or a backbone's small layers it is about
    4 times a forward of the globals, and 3 times one of the locals."""
    settings = race.read_settings("embedded", TINY)
    torch.manual_seed(0)
    backbone = race.make_backbone(settings)
    head = race.make_head(settings, backbone.embed_dim)
    B = settings.batch_size_per_gpu

    def forward(views: int, size: int) -> int:
        x = torch.randn(views * B, 3, size, size)
        return flops(lambda: head(backbone(x)))

    by_hand = 4 * forward(2, 32) + 3 * forward(1, 16)
    assert flops_of_a_step() == pytest.approx(by_hand, rel=0.05)


def test_the_judges_images_and_seeds_are_none_of_a_contestants(place, monkeypatch):
    seen = []

    def spy(entry, settings, split, track, budget):
        seen.append((settings.seed, split[0].source, split[1].source))
        return race.Outcome(50.0 + settings.seed % 7, 20.0, 70.0, budget, 1.0)

    monkeypatch.setattr(race, "train_one", spy)
    enter("--track", "embedded", "--name", "a")
    seeds = [seed for seed, _, _ in seen]
    assert len(set(seeds)) == 3 and Settings().seed not in seeds
    theirs = make_creatures(TRAIN + TEST, 32).images  # what train.py would draw
    for _, train, test in seen:
        for image in torch.cat([train, test]):
            assert not (image == theirs).flatten(1).all(dim=1).any(), "an image of train.py's"
    assert not torch.equal(seen[0][1], seen[1][1]), "each seed has creatures of its own"


def test_labels_masks_and_test_images_never_reach_the_training(place, monkeypatch):
    given = []

    def launch(settings, hooks):
        with race.hardware.start("cpu", "fp32") as world:
            images, test = hooks.read_images(settings, world)
            given.append((images, test))
            run = hooks.start_run(settings, world)
            run.history.append({"images_per_s": 1.0})

    monkeypatch.setattr(race.train, "launch", launch)
    enter("--track", "embedded", "--name", "a", "--budget", "0.001")
    assert len(given) == 3
    for images, test in given:
        assert images.labels is None and images.masks is None and images.classes == []
        assert len(images) == TRAIN and test is None


def test_a_files_own_loss_is_what_trains(place, monkeypatch, capsys):
    (place / "mine.py").write_text(OWN_LOSS)
    monkeypatch.setattr(race, "SEEDS", (101, 102))
    enter("--track", "embedded", "--name", "a", "--budget", "0.001", "--entry", "mine.py")
    said = capsys.readouterr().out
    assert said.count("my own loss 31") >= 2 * 2, "counted once and trained with, for each seed"
    (line,) = entries(place)
    assert line["entry"] == "mine.py"
    assert line["recipe"] == "--preset lab --warmup_epochs 2"
    assert line["settings"] == " ".join(TINY)


def test_the_score_stands_beside_raw_pixels_and_the_seeds_untrained_network(
    place, monkeypatch, capsys
):
    monkeypatch.setattr(race, "SEEDS", (101, 102))
    enter("--track", "embedded", "--name", "a", "--budget", "0.001")
    (line,) = entries(place)
    untrained, pixels = [], []
    for seed in (101, 102):
        settings = race.read_settings("embedded", [*TINY])
        torch.manual_seed(seed)
        network = race.make_backbone(settings)
        view = EvaluationView(32, settings.eval_crop, settings.mean, settings.std)
        with race.hardware.start("cpu", "fp32") as world:
            for kept, features_of in ((untrained, network), (pixels, Pixels())):
                features = extract(features_of, few_creatures(seed), view, world)
                kept.append(knn_accuracies(features)[20][0])
    assert line["untrained"] == pytest.approx(sum(untrained) / 2, abs=0.01)
    assert line["pixels"] == pytest.approx(sum(pixels) / 2, abs=0.01)
    said = capsys.readouterr().out
    assert f"(untrained {untrained[0]:.1f}, raw pixels {pixels[0]:.1f})" in said


def test_settings_that_a_file_writes_are_a_copy(place, monkeypatch, capsys):
    """So it cannot lengthen the training."""
    (place / "mine.py").write_text(
        "from loss import DINOLoss\n\n\n"
        "def make_loss(settings):\n"
        "    settings.epochs = 3\n"
        "    return DINOLoss(settings.out_dim)\n"
    )
    monkeypatch.setattr(race, "SEEDS", (101, 102))
    enter("--track", "embedded", "--name", "a", "--budget", "0.001", "--entry", "mine.py")
    assert "epoch 1/1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def make_los(settings):\n    pass\n", "make_los is no part of a training"),
        ("import torch\n\ndef _helper():\n    pass\n", "replaces nothing: define one of"),
        ("make_loss = 3\n", "make_loss is 3: write a function def make_loss(...)"),
        ("def make_loss(:\n", "does not run (SyntaxError"),
        ("1 / 0\n", "does not run (ZeroDivisionError"),
        ("def make_loss(settings):\n    pass\n", "make_loss returned None: it must return a Mod"),
        ("import torch\n\ndef make_backbone(settings):\n    return torch.nn.Identity()\n",
         "has no embed_dim"),
        ("def make_loss(settings):\n    return settings.nothing\n",
         "make_loss fails in line 2 (AttributeError"),
        ("def make_head(settings):\n    pass\n", "make_head fails when it is called (TypeError"),
    ],
)
def test_a_file_that_cannot_race_is_one_line(place, capsys, text, words):
    (place / "mine.py").write_text(text)
    assert words in refusal(capsys, "--entry", "mine.py")
    assert not (place / "race.jsonl").exists()


@pytest.mark.parametrize(
    ("own", "flags", "words"),
    [
        (["--entry", "nowhere.py"], TINY, "--entry 'nowhere.py' is not there"),
        ([], ["--seed", "101"], "--seed is not the contestant's"),
        ([], ["--epochs=9"], "--epochs is not the contestant's"),
        ([], ["--preset", "photos"], "--preset is not the contestant's (all entries of a track"),
        ([], ["--init_from", "dino_vits16"], "a network starts from random weights"),
        ([], [*TINY, "--warmup_epochs", "19"], "--warmup_epochs 19 is longer than the training"),
        ([], [*TINY, "--warmup_epochs", "1e6"], "--warmup_epochs 1e+06 is longer than the train"),
        (["--budget", "1e-9"], TINY, "the budget does not pay for one step"),
        (["--budget", "nan"], TINY, "--budget nan must be above 0"),
        (["--data_path", "photos"], TINY, "--data_path is for --track photos"),
        ([], ["--lr", "-1"], "--lr -1.0 must be at least 0"),
        ([], [*TINY, "--out_dim", str(10**12)], "the memory does not suffice"),
    ],
)
def test_what_a_contestant_may_not_is_one_line(place, capsys, own, flags, words):
    assert words in refusal(capsys, *own, flags=flags)


def test_ctrl_c_says_that_a_race_does_not_continue(place, monkeypatch, capsys):
    honest = race.train.train_step
    steps = []

    def interrupted(*args):
        steps.append(1)
        if len(steps) == 2:  # the first is the one that is counted
            signal.raise_signal(signal.SIGINT)
        return honest(*args)

    monkeypatch.setattr(race.train, "train_step", interrupted)
    with pytest.raises(SystemExit) as stopped:
        enter("--track", "embedded", "--name", "a", "--budget", "0.001")
    assert stopped.value.code == 128 + signal.SIGINT
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "a race does not continue: the same command begins again, with the first seed"
    assert not (place / "race.jsonl").exists()


def line_of(mean: float, spread: float, **others) -> dict:
    return {"track": "embedded", "data": "creatures", "budget": 12.0, "name": "b",
            "mean": mean, "spread": spread, **others}


def test_a_lead_inside_the_spread_is_no_record():
    """The spread is the larger of both standard deviations; as much as it is too little."""
    old = line_of(60.0, 2.0)
    for mean, spread, record in [
        (61.9, 0.1, False), (62.0, 0.1, False), (62.1, 0.1, True), (62.1, 3.0, False),
        (63.1, 3.0, True), (55.0, 0.0, False),
    ]:
        line = line_of(mean, spread)
        race.compare(line, [line_of(50.0, 9.0), old])
        assert line["record"] == record, (mean, spread)
        assert line["difference"] == pytest.approx(mean - 60)


def test_an_entry_is_compared_with_its_own_contest_alone():
    line = line_of(10.0, 1.0)
    others = [line_of(90.0, 1.0, track="photos"), line_of(90.0, 1.0, budget=24.0)]
    assert "first entry" in race.compare(line, others)
    assert line["record"] and line["difference"] is None


def test_a_part_counts_however_it_was_made(place):
    (place / "mine.py").write_text(
        "from functools import partial\n\nfrom loss import DINOLoss\n\n\n"
        "def _loss(settings, m):\n    return DINOLoss(settings.out_dim, center_momentum=m)\n\n\n"
        "make_loss = partial(_loss, m=0.5)\n"
    )
    entry = race.read_entry("mine.py")
    assert entry.make_loss(race.read_settings("embedded", [])).center_momentum == 0.5


def test_a_head_without_a_last_layer_to_freeze_is_one_line(place, capsys):
    (place / "mine.py").write_text(
        "from torch import nn\n\n\ndef make_head(settings, embed_dim):\n"
        "    return nn.Sequential(nn.Linear(embed_dim, settings.out_dim))\n"
    )
    assert "has no last_layer to freeze" in refusal(capsys, "--entry", "mine.py")


def test_another_programs_lines_are_refused_before_the_trainings(place, capsys):
    (place / "race.jsonl").write_text('{"epoch": 0}\n')
    assert "--results race.jsonl is not the race's" in refusal(capsys)


def test_photos_are_raced_by_minutes(place, monkeypatch, capsys):
    """The steps that fit are trained; labels come from the class folders."""
    drawn = make_creatures(TRAIN, 32, seed=5)
    for number, image in enumerate(drawn.images):
        folder = place / "photos" / f"class{number % 4}"
        folder.mkdir(parents=True, exist_ok=True)
        to_pil_image(image).save(folder / f"{number}.png")
    measured = []

    def a_known_speed(contest, *arguments):
        measured.append(cost_of_step(contest, *arguments))
        return 0.01  # minutes, however busy the machine

    cost_of_step = race.Contest.cost_of_step
    monkeypatch.setattr(race.Contest, "cost_of_step", a_known_speed)
    monkeypatch.setattr(race, "SEEDS", (101, 102))
    monkeypatch.setattr(race, "TOLERANCE", 100.0)
    flags = [*TINY, "--warmup_teacher_temp_epochs", "0", "--epoch_images", "0"]
    contest = ["--track", "photos", "--budget", "0.055", "--data_path", "photos"]
    enter(*contest, "--name", "a", flags=flags)
    assert len(measured) == 2 and min(measured) > 0
    (line,) = entries(place)
    assert line["unit"] == "minutes" and line["data"] == "photos" and line["spent"] > 0
    said = capsys.readouterr().out
    assert "32 images, 5 steps of 4 an epoch" in said, "a fifth of them are test images"
    with pytest.raises(SystemExit):
        monkeypatch.setattr(race, "TOLERANCE", 1e-9)
        enter(*contest, "--name", "b", flags=flags)
    assert "is not entered" in capsys.readouterr().err
    assert len(entries(place)) == 1


def test_the_pages_example_is_an_entry_and_its_budgets_are_the_judges(place):
    (example,) = re.findall(r"```python\n(from loss.*?)```", PAGE, re.DOTALL)
    (place / "slow_center.py").write_text(example)
    entry = race.read_entry("slow_center.py")
    assert entry.make_loss(race.read_settings("embedded", [])).center_momentum == 0.99
    assert entry.make_head is race.make_head, "what the file lacks is DINO's"
    assert f"{race.BUDGETS['embedded']:g} TFLOP" in PAGE
    assert f"*photos* is {race.BUDGETS['photos']:g} minutes" in PAGE


def test_the_rest_of_an_entry_is_the_tracks_recipe():
    """Rule 4; the warm-ups of photos are shorter than the preset's."""
    lab = parse_settings(["--preset", "lab"])  # the records' recipe
    photos = parse_settings(["--preset", "photos"])
    raced = race.read_settings("embedded", [])
    assert (raced.out_dim, raced.weight_decay) == (lab.out_dim, lab.weight_decay) == (256, 0.04)
    assert raced.warmup_epochs == 2
    raced = race.read_settings("photos", ["--lr", "0.01"])
    assert (raced.out_dim, raced.lr) == (photos.out_dim, 0.01)
    assert raced.warmup_teacher_temp_epochs < photos.warmup_teacher_temp_epochs
    assert raced.warmup_epochs < photos.warmup_epochs


def test_a_few_minutes_of_photos_pay_for_the_warm_ups():
    """On one core ten minutes are five epochs of 147 steps; a single epoch is refused."""
    raced = race.read_settings("photos", [])
    assert race.fit(raced, steps=5 * 147, most=147) == (5, 147)
    with pytest.raises(InputError, match="the budget pays for 147 steps, and 147 are an epoch"):
        race.fit(raced, steps=147, most=147)


def test_the_shipped_entries_stand_as_the_judge_compares_them():
    lines = race.read_results(race.RESULTS)
    assert lines[0]["name"] == "the demo's recipe, its momentum rising to 1"
    assert lines[0]["settings"] == "--momentum_teacher_end 1", "the demo's recipe of then"
    for number, line in enumerate(lines):
        assert (line["track"], line["budget"]) == ("embedded", race.BUDGETS["embedded"])
        assert len(line["knn"]) == 3 and 0.9 * line["budget"] < line["spent"] <= line["budget"]
        again = dict(line)
        race.compare(again, lines[:number])
        assert again == line, "difference and record are those to the entries before it"
