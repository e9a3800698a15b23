"""The ablations' rows: each changes what it says and nothing else, to the papers' values; equal
rows are one run.
"""

from dataclasses import replace
from pathlib import Path

import pytest

from ablations import __main__ as ablations
from ablations import runs
from ablations.rows import STUDIES, Row
from ablations.train import AblationSettings
from settings import PRESETS, parse_settings


def flags_of(*argv: str):
    return ablations.parse_flags(["all", *argv])


@pytest.mark.parametrize("preset", ["lab", "vits16"])
@pytest.mark.parametrize("name", STUDIES)
def test_a_row_differs_from_its_base_in_exactly_what_the_table_says(name, preset):
    """Through train.py's own command line; a row that starts from another preset is compared with
    that one's base.
    """
    flags, study = flags_of("--preset", preset), STUDIES[name]

    def settings_with(changes: dict) -> AblationSettings:
        return runs.make_run(study, Row("", changes), 0, flags).settings

    base = settings_with({})
    for row in study.rows:
        changes = row.changes(preset)
        settings = runs.make_run(study, row, 0, flags).settings
        other_preset = {"preset": changes["preset"]} if "preset" in changes else {}
        assert settings == replace(
            settings_with(other_preset) if other_preset else base, **changes
        ), row.name
        swept = {
            setting
            for other in study.rows
            if other != row
            for setting, value in other.changes(preset).items()
            if getattr(base, setting) != value
        }
        idle = {
            setting for setting, value in changes.items() if getattr(base, setting) == value
        } - swept
        assert not idle, (
            f"{row.name} says it changes {idle}, "
            "but the base and its other rows have these values too"
        )


@pytest.mark.parametrize("name", STUDIES)
def test_each_study_runs_with_the_recipe_for_photos(name):
    for row in STUDIES[name].rows:
        runs.make_run(STUDIES[name], row, 0, flags_of("--preset", "photos"))  # checks settings


@pytest.mark.parametrize("row", ["7 BYOL", "8 MoCo-v2", "1 DINO"])
def test_a_row_of_photos_keeps_the_recipes_learning_rate(row):
    """The demo's own for BYOL was sought on the demo."""
    (chosen,) = [one for one in STUDIES["components"].rows if one.name == row]
    run = runs.make_run(STUDIES["components"], chosen, 0, flags_of("--preset", "photos"))
    assert run.settings.lr == parse_settings(["--preset", "photos"]).lr
    assert run.settings.out_dim == {"7 BYOL": 256, "8 MoCo-v2": 128, "1 DINO": 4096}[row]


TABLE_7 = {  # momentum teacher, Sinkhorn-Knopp, multi-crop, loss, predictor
    "1 DINO": (True, False, True, "cross_entropy", False),
    "2 no momentum": (False, False, True, "cross_entropy", False),
    "3 Sinkhorn-Knopp": (True, True, True, "cross_entropy", False),
    "4 no multi-crop": (True, False, False, "cross_entropy", False),
    "5 MSE": (True, False, True, "mse", False),
    "6 predictor": (True, False, True, "cross_entropy", True),
    "7 BYOL": (True, False, False, "mse", True),
    "8 MoCo-v2": (True, False, False, "infonce", False),
    "9 SwAV": (False, True, True, "cross_entropy", False),
}
TABLE_15 = [
    ("momentum", "center"),
    ("momentum", "batch_softmax"),
    ("momentum", "sinkhorn"),
    ("student", "center"),
    ("student", "batch_softmax"),
    ("student", "sinkhorn"),
]


@pytest.mark.parametrize("preset", ["lab", "photos", "vits16"])
def test_table_7_s_ticks_and_table_15_s_columns_are_what_is_trained(preset):
    flags = flags_of("--preset", preset)

    def settings_of(name: str) -> list[AblationSettings]:
        return [runs.make_run(STUDIES[name], row, 0, flags).settings for row in STUDIES[name].rows]

    assert {
        row.name: (
            run.teacher == "momentum",
            run.centering == "sinkhorn",
            run.local_crops_number > 0,
            run.loss,
            run.predictor,
        )
        for row, run in zip(STUDIES["components"].rows, settings_of("components"))
    } == TABLE_7
    assert [(run.teacher, run.centering) for run in settings_of("swav")] == TABLE_15
    assert [run.teacher for run in settings_of("teachers")][:4] == [
        "momentum",
        "previous_epoch",
        "previous_iteration",
        "student",
    ]


METHODS = {  # as their own papers have them; MoCo-v2's head as DINO's appendix B has it
    "BYOL": {
        "loss": "mse",
        "predictor": True,
        "teacher": "momentum",
        "momentum_teacher": 0.996,
        "center_momentum": 1.0,
        "head_nlayers": 1,
        "head_hidden_dim": 4096,
        "use_bn_in_head": True,
        "head_activation": "relu",
        "head_l2_bottleneck": False,
        "out_dim": 256,
        "freeze_last_layer": 0,
    },
    "MoCo-v2": {
        "loss": "infonce",
        "predictor": False,
        "teacher": "momentum",
        "momentum_teacher": 0.999,
        "student_temp": 0.2,
        "queue_length": 65536,
        "head_nlayers": 2,
        "head_hidden_dim": 2048,
        "use_bn_in_head": True,
        "head_activation": "relu",
        "head_l2_bottleneck": False,
        "out_dim": 256,
        "freeze_last_layer": 0,
    },
    "SwAV": {
        "loss": "cross_entropy",
        "predictor": False,
        "teacher": "student",
        "centering": "sinkhorn",
        "student_temp": 0.1,
        "warmup_teacher_temp": 0.05,
        "teacher_temp": 0.05,
        "head_nlayers": 2,
        "head_hidden_dim": 2048,
        "head_bottleneck_dim": 128,
        "use_bn_in_head": True,
        "head_activation": "relu",
        "head_l2_bottleneck": True,
        "norm_last_layer": True,
        "out_dim": 3000,
    },
}
# where it has others: narrower, for few images and small batches; BYOL's step and teacher faster
IN_THE_LAB = {
    "BYOL": {"momentum_teacher": 0.95, "head_hidden_dim": 512, "lr": 0.016},
    "MoCo-v2": {
        "momentum_teacher": 0.99,
        "queue_length": 1024,
        "head_nlayers": 1,
        "head_hidden_dim": 256,
        "use_bn_in_head": False,
        "out_dim": 128,
    },
    "SwAV": {
        "warmup_teacher_temp": 0.02,
        "teacher_temp": 0.02,
        "head_hidden_dim": 256,
        "out_dim": 256,
    },
}


@pytest.mark.parametrize("preset", ["lab", "vits16"])
@pytest.mark.parametrize("method", METHODS)
def test_the_other_methods_have_their_own_papers_settings_wherever_they_stand(method, preset):
    """BYOL, MoCo-v2 and SwAV in Tables 2, 7 and 14 and in appendix E, on ViT and ResNet."""
    expected = METHODS[method] | (IN_THE_LAB[method] if preset == "lab" else {})
    found = [(study, row) for study in STUDIES.values() for row in study.rows if method in row.name]
    assert len(found) >= 5
    for study, row in found:
        settings = runs.make_run(study, row, 0, flags_of("--preset", preset)).settings
        recipe = PRESETS[row.changes(preset).get("preset", preset)]
        wanted = {"lr": recipe.get("lr", AblationSettings.lr)} | expected
        wanted |= {"predictor": False} if "no predictor" in row.name else {}
        assert {name: getattr(settings, name) for name in wanted} == wanted, (
            f"{study.where}: {row.name}"
        )


@pytest.mark.parametrize(
    ("name", "setting", "values"),
    [
        ("patch_size", "patch_size", [16, 8, 5]),
        ("crops", "local_crops_number", [0, 2, 6, 10]),
        ("batch_size", "batch_size_per_gpu", [8, 16, 32, 64]),
        ("center", "center_momentum", [0.0, 0.9, 0.99, 0.999]),
        ("temperature", "teacher_temp", [0.0001, 0.02, 0.04, 0.06, 0.08, 0.07]),
        ("epochs", "epochs", [100, 300, 800]),
        ("head", "out_dim", [1024, 4096, 16384, 65536, 262144]),
        ("head", "use_bn_in_head", [False, True]),
    ],
)
@pytest.mark.parametrize("preset", ["vits16", "vitb8", "small"])
def test_a_row_is_what_its_name_says_with_every_preset(name, setting, values, preset):
    """A value that is one preset's own is not another's, so rows say it."""
    flags, study = flags_of("--preset", preset), STUDIES[name]
    rows = {"out_dim": study.rows[-5:], "use_bn_in_head": study.rows[:2]}.get(setting, study.rows)
    assert [
        getattr(runs.make_run(study, row, 0, flags).settings, setting) for row in rows
    ] == values


@pytest.mark.parametrize(
    ("name", "column", "numbers"),
    [
        ("components", "k-NN", [72.8, 0.1, 72.2, 67.9, 52.6, 71.8, 66.6, 62.0, 64.7]),
        ("components", "linear", [76.1, 0.1, 76.0, 72.5, 62.4, 75.6, 71.4, 71.6, 71.8]),
        ("moco_byol", "linear", [76.1, 62.4, 75.6, 72.5, 71.4, 73.4, 71.4, 0.1, 52.6, 64.8]),
        ("swav", "linear", [76.1, 75.8, 76.0, 0.1, 72.2, 71.8]),
        ("teachers", "k-NN", [72.8, 66.6, 0.1, 0.1, None]),
        ("patch_size", "images/s", [1007, 180, 44]),
        ("crops", "linear", [72.5, 74.5, 75.9, 76.1]),
        ("crops", "linear at 100 epochs", [67.8, 71.5, 73.8, 74.6]),
        ("crops", "hours", [45.9, 51.0, 60.9, 72.6]),
        ("crops", "GiB", [9.3, 10.5, 12.9, 15.4]),
        ("scale", "k-NN", [65.6, 68.0, 69.7, 69.8, 69.5]),
        ("multicrop", "k-NN", [66.6, 59.8, 60.5, 64.7, 62.0, 65.4, 67.9, 72.7]),
        ("multicrop", "linear", [71.4, 64.8, 68.5, 71.8, 71.6, 73.4, 72.5, 75.9]),
        ("batch_size", "k-NN", [57.9, 59.1, 59.6, 59.9]),
        (
            "head",
            "k-NN",
            [
                69.7,
                68.6,
                69.7,
                68.9,
                62.2,
                68.0,
                69.3,
                61.6,
                62.9,
                0.1,
                0.1,
                67.8,
                69.3,
                69.2,
                69.7,
                69.1,
            ],
        ),
        ("center", "k-NN", [69.1, 69.7, 69.4, 0.1]),
        ("temperature", "k-NN", [43.9, 66.7, 69.6, 68.7, 0.1, 69.7]),
        ("heads", "k-NN", [72.8, 73.1, 73.7, 73.8]),
        ("heads", "images/s", [1007, 971, 927, 860]),
        ("epochs", "k-NN", [70.9, 72.8, 74.5]),
        ("methods", "k-NN", [66.6, 64.4, 66.3, 74.5, 64.8, 61.9, 65.7, 67.5]),
        ("methods", "linear", [71.4, 72.7, 73.5, 77.0, 74.4, 71.1, 75.3, 75.3]),
    ],
)
def test_the_paper_s_numbers_stand_in_the_rows(name, column, numbers):
    """Tables 2, 7, 8, 9, 14 and 15, Fig. 5 and 6, appendix C, D and E, in their order."""
    assert [row.paper.get(column) for row in STUDIES[name].rows] == numbers


@pytest.mark.parametrize("name", ["scale", "head", "center", "temperature"])
def test_the_tables_of_100_epochs_have_6_local_crops(name):
    """Their common 69.7 % is not the 70.9 % that "longer training" has with 10."""
    flags, study = flags_of("--preset", "vits16"), STUDIES[name]
    runs_of_rows = [runs.make_run(study, row, 0, flags).settings for row in study.rows]
    assert {(run.epochs, run.local_crops_number) for run in runs_of_rows} == {(100, 6)}
    longer = runs.make_run(STUDIES["epochs"], STUDIES["epochs"].rows[0], 0, flags).settings
    assert (longer.epochs, longer.local_crops_number) == (100, 10)


def test_no_two_rows_of_a_study_share_a_name():
    for name, study in STUDIES.items():
        assert len({row.name for row in study.rows}) == len(study.rows), name


def test_the_collapse_study_expects_fig_7():
    assert [row.verdict for row in STUDIES["collapse"].rows] == [
        "",
        "COLLAPSE, uniform",
        "COLLAPSE, one-hot",
        None,
    ]


def test_equal_settings_share_a_folder_and_others_do_not():
    """DINO's own row stands in several studies, and is trained once."""

    def folder(name: str, row: int, *argv: str, seed: int = 0) -> Path:
        flags, study = flags_of(*argv), STUDIES[name]
        return runs.make_run(study, study.rows[row], seed, flags).folder

    dino = folder("components", 0)
    assert flags_of().preset == "lab", "without data, where train.py takes the demo"
    assert dino == folder("collapse", 0) == folder("heads", 0) == folder("methods", 3)
    assert dino == folder("components", 0, "--", "--num_workers", "0"), (
        "workers do not change a run"
    )
    assert dino == folder("components", 0, "--", "--download"), (
        "nor whether its images were there already"
    )
    others = [
        folder("components", 1),
        folder("components", 0, seed=1),
        folder("components", 0, "--epochs", "5"),
        folder("components", 0, "--nproc_per_node", "2"),
        folder("components", 0, "--", "--lr", "0.001"),
    ]
    assert len({dino, *others}) == 6


def test_the_row_has_the_last_word_and_the_command_line_the_one_before():
    flags = flags_of(
        "--preset",
        "lab",
        "--epochs",
        "7",
        "--",
        "--local_crops_number",
        "3",
        "--warmup_epochs",
        "2",
    )
    study = STUDIES["components"]
    base, alone = (runs.make_run(study, study.rows[i], 5, flags) for i in (0, 3))
    assert (
        base.settings.epochs,
        base.settings.local_crops_number,
        base.settings.warmup_epochs,
    ) == (7, 3, 2)
    assert (alone.settings.epochs, alone.settings.local_crops_number, alone.settings.seed) == (
        7,
        0,
        5,
    )
    assert base.command[-2:] == ["--output_dir", str(base.folder)]
