"""Hostile checkpoints: code in the pickle, torn files, claims, wrong shapes and types: a result or
one clear line.
"""

import copy
import io
import math
import pickle
import random
import zipfile
from pathlib import Path

import pytest
import torch
from test_runs import TINY, write_photos

import train
from runtime.commandline import InputError
from runtime.hardware import World
from settings import parse_settings
from training.checkpoint import load_backbone, read_checkpoint
from training.run_state import build_student, load_run, start_run

pytestmark = [pytest.mark.faults, pytest.mark.slow]
HERE = World(0, 1, torch.device("cpu"), torch.float32)
GIB10 = 10 * 2**30


class Code:
    """A pickle of this calls a function when it is read."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[dict, list[str]]:
    """A checkpoint after one epoch, and the command that made it."""
    folder = tmp_path_factory.mktemp("trained")
    flags = [
        *TINY,
        "--data_path",
        str(write_photos(folder / "photos")),
        "--output_dir",
        str(folder / "run"),
        "--epochs",
        "2",
        "--knn_every",
        "0",
    ]
    train.main([*flags, "--epochs", "1"])
    return read_checkpoint(folder / "run/checkpoint.pth"), flags


def outcome(read) -> str:
    """ "" for a result, else the line; an assertion fails on a line that is none, and any other
    exception passes on.
    """
    try:
        read()
    except InputError as error:
        assert 10 < len(str(error)) < 700 and "\n" not in str(error), f"not one clear line: {error}"
        return str(error)
    return ""


def readers(file: Path, flags: list[str]) -> dict[str, str]:
    """What each of those that read a checkpoint makes of it: evaluations, a run that goes on, and
    one that starts.
    """
    settings = parse_settings([*flags, "--output_dir", str(file.parent)])
    starting = parse_settings([*flags, "--output_dir", str(file.parent), "--init_from", str(file)])
    return {
        "load_backbone": outcome(lambda: load_backbone(file)),
        "of the student": outcome(lambda: load_backbone(file, "student", "vit_nano")),
        "start_run": outcome(lambda: load_run(file, start_run(settings, HERE), settings)),
        "--init_from": outcome(lambda: build_student(starting)),
    }


def claimed(*shape: int) -> torch.Tensor:
    """A tensor of one number that claims this shape."""
    return torch.zeros(()).expand(*shape)


VALUES = {  # what may stand in another's place
    "None": None,
    "text": "text",
    "number": 7,
    "negative": -3,
    "NaN": math.nan,
    "infinity": math.inf,
    "list": [1, [2]],
    "dict": {"a": 1},
    "empty": {},
    "tuple": (),
    "bytes": b"bytes",
    "true": True,
    "huge": 10**30,
    "scalar": torch.zeros(()),
    "vector": torch.zeros(5),
    "nan tensor": torch.full((3,), math.nan),
    "complex": torch.zeros(3, dtype=torch.complex64),
    "int": torch.ones(3, dtype=torch.int64),
    "claims 10 GB": claimed(GIB10 // 4),
    "meta": torch.zeros(GIB10, device="meta"),
    "sparse": torch.zeros(3, 3).to_sparse(),
    "no rows": torch.zeros(0, 3),
}
PLACES = [
    (name,)
    for name in (
        "student",
        "teacher",
        "dino_loss",
        "optimizer",
        "epoch",
        "images_done",
        "metrics",
        "seconds",
        "history",
        "args",
    )
] + [
    ("teacher", "backbone.cls_token"),
    ("teacher", "backbone.pos_embed"),
    ("student", "head.mlp.0.weight"),
    ("teacher", "backbone.patch_embed.proj.weight"),
    ("dino_loss", "center"),
    ("optimizer", "state"),
    ("optimizer", "param_groups"),
    ("optimizer", "state", 0),
    ("optimizer", "state", 0, "exp_avg"),
    ("optimizer", "state", 0, "step"),
    ("optimizer", "param_groups", 0),
    ("optimizer", "param_groups", 0, "params"),
    ("optimizer", "param_groups", 0, "betas"),
    ("optimizer", "param_groups", 0, "lr"),
    ("history", 1),
    ("history", 1, "train_loss"),
    ("args", "arch"),
    ("args", "num_heads"),
    ("args", "patch_size"),
    ("args", "eval_size"),
    ("args", "eval_crop"),
    ("args", "mean"),
    ("args", "std"),
    ("args", "out_dim"),
    ("args", "data_path"),
]


def put(checkpoint: dict, place: tuple, value) -> dict:
    """A copy with another value there."""
    checkpoint = copy.deepcopy(checkpoint)
    inside = checkpoint
    for key in place[:-1]:
        inside = inside[key]
    inside[place[-1]] = value
    return checkpoint


@pytest.mark.parametrize("place", PLACES, ids=lambda place: ".".join(map(str, place)))
def test_anything_in_anothers_place_is_a_result_or_one_line(place, trained, tmp_path):
    """Some values in each place, by lot, read by all: over a hundred files."""
    checkpoint, flags = trained
    file = tmp_path / "checkpoint.pth"
    for name, value in random.Random(str(place)).sample(sorted(VALUES.items(), key=str), 3):
        torch.save(put(checkpoint, place, value), file)
        said = readers(file, flags)
        if place[0] in ("student", "teacher", "dino_loss"):
            assert said["start_run"], f"a {name} there must not go on"
    assert list(tmp_path.iterdir()) == [file]


def deep(levels: int) -> tuple:
    """A tuple of twice the same tuple, and so on: to walk through it takes 2 ** levels steps."""
    value = (1,)
    for _ in range(levels):
        value = (value, value)
    return value


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("epoch",), "text"),
        (("images_done",), None),
        (("optimizer",), {}),
        (("metrics",), torch.zeros(5)),
        (("history",), 7),
        (("student", "a\nname"), torch.zeros(1)),
        (("args", "arch"), "a\nb" + 3000 * "c"),
        (("args", "loss"), "mse"),
    ],
)
def test_a_run_does_not_go_on_from_what_no_run_saves(place, value, trained, tmp_path):
    """Counts that are no numbers, another optimizer's state, another network's or method's run."""
    checkpoint, flags = trained
    torch.save(put(checkpoint, place, value), tmp_path / "checkpoint.pth")
    assert readers(tmp_path / "checkpoint.pth", flags)["start_run"], f"{value} went on as {place}"


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lars"])
def test_a_run_does_not_go_on_from_averages_of_gradients_that_are_none(
    optimizer, trained, tmp_path
):
    """Each is spoilt alone: another shape, NaN, infinity, no tensor, or it is missing."""
    _, flags = trained
    flags = [*flags, "--optimizer", optimizer, "--output_dir", str(tmp_path)]
    train.main([*flags, "--epochs", "1"])
    file = tmp_path / "checkpoint.pth"
    checkpoint = read_checkpoint(file)
    settings = parse_settings(flags)
    assert not outcome(lambda: load_run(file, start_run(settings, HERE), settings))

    names = checkpoint["optimizer"]["state"][2].keys()
    assert len(names) == {"adamw": 3, "sgd": 1, "lars": 1}[optimizer]
    for name in names:
        right = checkpoint["optimizer"]["state"][2][name]
        spoilt = [
            torch.full_like(right, math.nan),
            torch.full_like(right, -math.inf),
            right.expand(3, *right.shape),
            torch.zeros(5),
            torch.zeros(0, 3),
            0.5 * right.to(torch.complex64),
            "text",
            None,
            [1.0],
        ]
        if right.ndim:
            spoilt += [right[:-1], right.sum()]
        for value in spoilt:
            torch.save(put(checkpoint, ("optimizer", "state", 2, name), value), file)
            said = outcome(lambda: load_run(file, start_run(settings, HERE), settings))
            assert str(file) in said, f"went on with {value} as {name}"

        less = copy.deepcopy(checkpoint)
        del less["optimizer"]["state"][2][name]
        torch.save(less, file)
        if len(names) > 1:
            assert outcome(lambda: load_run(file, start_run(settings, HERE), settings)), name


@pytest.mark.parametrize("name", ["lr", "betas", "eps", "weight_decay", "decays", "foreach"])
def test_a_group_of_the_optimizer_is_the_commands_and_not_the_files(name, trained, tmp_path):
    checkpoint, flags = trained
    settings = parse_settings([*flags, "--output_dir", str(tmp_path)])
    run = start_run(settings, HERE)
    wanted = [group[name] for group in run.optimizer.param_groups]
    torch.save(
        put(checkpoint, ("optimizer", "param_groups", 0, name), "text"),
        tmp_path / "checkpoint.pth",
    )
    load_run(tmp_path / "checkpoint.pth", run, settings)
    assert [group[name] for group in run.optimizer.param_groups] == wanted


def test_flags_as_deep_as_a_tree_are_not_walked_through(trained, tmp_path):
    """And a key that is no text is named, not tripped over."""
    checkpoint, flags = trained
    file = tmp_path / "checkpoint.pth"
    torch.save(put(checkpoint, ("args", "mean"), deep(40)), file)
    readers(file, flags)
    torch.save({"student": checkpoint["student"], 1: 2}, file)
    assert "has no 'teacher', but student.backbone." in readers(file, flags)["load_backbone"]


def kinds(tensor: torch.Tensor, rng: random.Random) -> list[torch.Tensor]:
    """The tensor, spoilt in a way: another type, shape, claim, or a number that is none."""
    bad = tensor.clone().float()
    bad.view(-1)[rng.randrange(bad.numel())] = rng.choice([math.nan, math.inf, -math.inf])
    return [
        bad,
        tensor.to(torch.complex64),
        tensor.to(torch.int8),
        tensor[..., :-1],
        tensor.unsqueeze(0),
        claimed(*tensor.shape, 10**8),
        tensor.to("meta"),
        tensor.to_sparse(),
    ]


def test_spoilt_weights_are_refused_by_all_who_read_them(trained, tmp_path):
    checkpoint, flags = trained
    rng, file, cases = random.Random(0), tmp_path / "checkpoint.pth", 0
    names = [
        name
        for name, value in checkpoint["teacher"].items()
        if value.is_floating_point() and "backb" in name
    ]
    for name in rng.sample(names, 3):
        for spoilt in kinds(checkpoint["teacher"][name], rng):
            torch.save(
                put(put(checkpoint, ("teacher", name), spoilt), ("student", name), spoilt), file
            )
            for reader, said in readers(file, flags).items():
                assert str(file) in said, (
                    f"{reader} took {name} as {spoilt.dtype} {tuple(spoilt.shape)}"
                )
            cases += 1
    assert cases >= 24


def test_half_and_double_precision_are_weights_too(trained, tmp_path):
    checkpoint, _ = trained
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        torch.save(
            {
                "teacher": {
                    name: value.to(dtype) if value.is_floating_point() else value
                    for name, value in checkpoint["teacher"].items()
                }
            },
            tmp_path / "half.pth",
        )
        assert load_backbone(tmp_path / "half.pth")[0].cls_token.dtype == torch.float32


def test_missing_and_surplus_weights_are_listed(trained, tmp_path):
    checkpoint, flags = trained
    rng, file = random.Random(0), tmp_path / "checkpoint.pth"
    for name in rng.sample(sorted(checkpoint["teacher"]), 2):
        for key in ("teacher", "student"):
            spoilt = copy.deepcopy(checkpoint)
            value = spoilt[key].pop(name)
            torch.save(spoilt, file)
            assert name in readers(file, flags)["start_run"]
            spoilt[key] |= {name: value, f"{name}.more": value}
            torch.save(spoilt, file)
            assert "unexpected 1" in readers(file, flags)["start_run"]


def test_a_checkpoint_cut_anywhere_is_refused_by_all(trained, tmp_path):
    checkpoint, flags = trained
    whole = io.BytesIO()
    torch.save(checkpoint, whole)
    file = tmp_path / "checkpoint.pth"
    for twentieth in range(20):
        file.write_bytes(whole.getvalue()[: len(whole.getvalue()) * twentieth // 20])
        assert all("truncated" in said for said in readers(file, flags).values())


@pytest.mark.parametrize("legacy", [False, True])
def test_flipped_bytes_are_a_result_or_one_line(legacy, trained, tmp_path):
    """In the pickle and the zip's own records, where a byte says more than one of a weight does."""
    checkpoint, flags = trained
    rng, whole, file = random.Random(0), io.BytesIO(), tmp_path / "checkpoint.pth"
    small = {
        "teacher": {"cls_token": checkpoint["teacher"]["backbone.cls_token"]},
        "args": checkpoint["args"],
    }
    torch.save(small, whole, _use_new_zipfile_serialization=not legacy)
    for _ in range(60):
        spoilt = bytearray(whole.getvalue())
        for _ in range(rng.randint(1, 8)):
            spoilt[rng.randrange(len(spoilt))] = rng.randrange(256)
        file.write_bytes(spoilt)
        readers(file, flags)


@pytest.mark.parametrize(
    "place", [(), ("teacher",), ("args",), ("args", "arch"), ("optimizer", "state"), ("history",)]
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_code_is_refused_and_not_run(place, protocol, trained, tmp_path, monkeypatch):
    checkpoint, flags = trained
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "run"
    folder.mkdir()
    for code in (
        Code(open, "was-here", "w"),
        Code(eval, "open('was-here', 'w')"),
        Code(getattr, 1, "real"),
        Code(torch.hub.load, "no", "no"),
        Code(pickle.loads, b"N."),
    ):
        spoilt = put(checkpoint, place, code) if place else code
        torch.save(spoilt, folder / "checkpoint.pth", pickle_protocol=protocol)
        for said in readers(folder / "checkpoint.pth", flags).values():
            assert "never run" in said or "truncated" in said
        (folder / "checkpoint.pth").write_bytes(pickle.dumps(code, protocol=protocol))
        assert all(readers(folder / "checkpoint.pth", flags).values())
    assert [path.name for path in tmp_path.iterdir()] == ["run"], "code from the file was run"


def test_a_file_that_unpacks_to_ten_gigabytes_is_refused_before_it_is(trained, tmp_path):
    """PyTorch stores its records as they are; a packed one may be a thousand times larger than the
    file.
    """
    _, flags = trained
    plain, file = io.BytesIO(), tmp_path / "checkpoint.pth"
    torch.save({"teacher": {"cls_token": torch.zeros(3)}}, plain)
    with (
        zipfile.ZipFile(plain) as source,
        zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for record in source.infolist():
            packed.writestr(record.filename, source.read(record))
        with packed.open("archive/data/1", "w", force_zip64=True) as large:
            for _ in range(64):
                large.write(bytes(2**20))
    assert file.stat().st_size < 2**20
    assert all("truncated or no checkpoint" in said for said in readers(file, flags).values())
