"""BYOL's and MoCo's losses against their papers' equations; the ablations' trainings as runs."""

import dataclasses
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from ablations import moco
from ablations import train as ablations_train
from ablations.byol import SquaredDistance
from ablations.moco import InfoNCE, shuffle_batches
from ablations.rows import BYOL_DEMO, MOCO_DEMO, PAIR_DEMO, SWAV_DEMO, as_flags
from ablations.train import AblationSettings, make_loss, make_student, parse, start_run
from ablations.variants import SinkhornLoss
from loss import DINOLoss
from runtime.commandline import InputError
from runtime.hardware import World
from settings import Settings, parse_settings
from train import Schedules, train_step
from training import ablated, run_state
from training.run_state import build_student, load_run, save_run

B, V, K, T = 3, 5, 7, 0.07
HERE = World(0, 1, torch.device("cpu"), torch.float32)


def random_logits(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(V * B, K, generator=generator).requires_grad_(), torch.randn(
        2 * B, K, generator=generator
    ) / 10


def test_byols_loss_is_the_squared_distance_of_normalised_outputs():
    """BYOL, Eq. 2, over all pairs of different views; row 5's center is taken off the teacher's."""
    (student, teacher), loss_fn = random_logits(), SquaredDistance(K)
    loss_fn.center.normal_(generator=torch.Generator().manual_seed(1))
    expected = [
        ((s / s.norm() - (t - loss_fn.center[0]) / (t - loss_fn.center[0]).norm()) ** 2)
        .sum()
        .item()
        for x in range(2)
        for v in range(V)
        if v != x
        for s, t in zip(student.detach()[v * B : (v + 1) * B], teacher[x * B : (x + 1) * B])
    ]
    assert loss_fn(student, teacher, T).item() == pytest.approx(
        sum(expected) / len(expected), rel=1e-5
    )


def test_infonce_tells_the_own_image_from_the_queue():
    """MoCo, Eq. 1: -log of the positive's share, with plain loops in float64."""
    (student, teacher), loss_fn = random_logits(), InfoNCE(K, temperature=0.2, queue_length=11)
    unit, queue, losses = lambda x: x.double() / x.double().norm(), loss_fn.queue.double(), []
    for x in range(2):
        for v in range(V):
            for b in range(B) if v != x else ():
                q, k = unit(student.detach()[v * B + b]), unit(teacher[x * B + b])
                scores = [math.exp(q @ n / 0.2) for n in (k, *queue)]
                losses.append(-math.log(scores[0] / sum(scores)))
    assert loss_fn(student, teacher, T).item() == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_the_queue_holds_the_last_keys_oldest_first_and_the_loss_used_the_old_ones():
    loss_fn = InfoNCE(K, queue_length=8)
    first, steps = loss_fn.queue.clone(), [random_logits(seed)[1] for seed in range(3)]
    keys = [F.normalize(step, dim=-1) for step in steps]  # 6 a step
    for n, (step, expected) in enumerate(
        zip(
            steps,
            [
                torch.cat([first[6:], keys[0]]),
                torch.cat([keys[0][4:], keys[1]]),
                torch.cat([keys[1][4:], keys[2]]),
            ],
        )
    ):
        before = loss_fn.queue.clone()
        loss_fn(random_logits()[0], step, T)
        assert torch.equal(loss_fn.queue, before), "a step's keys must not be their own negatives"
        loss_fn.update_center(step)
        torch.testing.assert_close(
            loss_fn.queue, expected, msg=f"the order is wrong after step {n + 1}"
        )
    assert "queue" in loss_fn.state_dict(), "the queue is part of the checkpoint"


def test_more_keys_than_the_queue_holds_leave_the_latest():
    loss_fn, (student, teacher) = InfoNCE(K, queue_length=4), random_logits()
    loss_fn(student, teacher, T)
    loss_fn.update_center(teacher)
    torch.testing.assert_close(loss_fn.queue, F.normalize(teacher, dim=-1)[-4:])


@pytest.mark.parametrize("loss_fn", [SinkhornLoss(K), SquaredDistance(K), InfoNCE(K, 0.2, 11)])
def test_no_gradient_reaches_the_teacher_and_no_view_meets_itself(loss_fn):
    student, teacher = random_logits()
    teacher.requires_grad_()
    loss_fn(student, teacher, T).backward()
    assert teacher.grad is None, "the teacher's side must be detached"
    student.grad = None
    only_one = student.detach()[: 2 * B].clone().requires_grad_()
    loss_fn(
        only_one, torch.cat([teacher.detach()[:B], 9 * teacher.detach()[B:].roll(1, 0)]), T
    ).backward()
    changed = only_one.grad.clone()
    only_one.grad = None
    loss_fn(only_one, torch.cat([teacher.detach()[:B], teacher.detach()[B:]]), T).backward()
    if not isinstance(loss_fn, SinkhornLoss):  # whose targets share one batch
        torch.testing.assert_close(
            changed[B:], only_one.grad[B:], msg="view 2 must not be compared with view 2"
        )
        assert not torch.allclose(changed[:B], only_one.grad[:B])


def test_a_loss_that_talks_to_other_processes_is_not_compiled():
    """Nor one that collects keys: its list would grow inside of the graph."""
    assert not SinkhornLoss(K).compiles and not InfoNCE(K).compiles


@pytest.mark.parametrize("kind", [DINOLoss, SquaredDistance])
def test_a_loss_that_is_compiled_is_one_graph(kind):
    """aot_eager traces forward and backward without a toolchain."""
    loss_fn, results = kind(K), []
    assert getattr(loss_fn, "compiles", True)
    for forward in (loss_fn, torch.compile(loss_fn, backend="aot_eager", fullgraph=True)):
        student, teacher = random_logits()
        loss = forward(student, teacher, T)
        loss.backward()
        results.append([loss.detach(), student.grad])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


def test_the_batch_is_shuffled_over_the_processes_and_the_order_restored(monkeypatch):
    """Two threads as two processes: each one's teacher sees images of both, and its keys come back
    in order.
    """
    images = torch.arange(10.0).view(2, 5, 1)  # an image's number is its pixel
    shared, meet = [None, None], Barrier(2, timeout=9)

    class Teacher(nn.Module):
        def forward(self, crops):
            self.seen = [crop.flatten().tolist() for crop in crops]
            return torch.cat(crops)

    def teach(rank: int) -> tuple[torch.Tensor, list[list[float]]]:
        teacher = Teacher()
        world = SimpleNamespace(rank=rank, size=2, device=torch.device("cpu"))
        shuffle_batches(teacher, world)
        return teacher([images[rank], 10 + images[rank]]), teacher.seen

    def gather(rows: torch.Tensor, world) -> torch.Tensor:
        shared[world.rank] = rows
        meet.wait()
        joined = torch.cat(shared)
        meet.wait()
        return joined

    monkeypatch.setattr(moco, "gather", gather)
    torch.manual_seed(0)
    with ThreadPoolExecutor() as processes:
        (keys, seen), (other_keys, other_seen) = processes.map(teach, range(2))
    for rank, found in enumerate((keys, other_keys)):
        assert torch.equal(found, torch.cat([images[rank], 10 + images[rank]])), (
            "each key must return to its query"
        )
    for view in range(2):
        assert sorted(seen[view] + other_seen[view]) == [10 * view + n for n in range(10)], (
            "each image is seen once"
        )
        own = {10.0 * view + n for n in range(5)}
        assert own & set(other_seen[view]) and own - set(other_seen[view]), (
            "a process's images must go to both"
        )


FLAGS = (
    "--preset vits16 --arch vit_nano --patch_size 16 --global_crops_size 32 --local_crops_size 16 "
    "--local_crops_number 1 --eval_size 32 --head_hidden_dim 29 --head_bottleneck_dim 7 "
    "--out_dim 31 --batch_size_per_gpu 4 "
    "--warmup_epochs 0 --warmup_teacher_temp_epochs 0 --epochs 2"
).split()
RUN = "--num_workers 0 --device cpu --precision fp32 --knn_every 0".split()


def write_images(folder: Path) -> Path:
    """Eight images without labels: two steps."""
    folder.mkdir()
    for number in range(8):
        Image.new("RGB", (40, 40), (30 * number, 0, 0)).save(folder / f"{number}.png")
    return folder


def steps_of(kind: str, folder: Path, monkeypatch) -> tuple[list[dict], list[dict]]:
    """Train 3 epochs of two steps -> the student's weights in each step, and the teacher's that
    served in it.
    """
    students, teachers, honest = [], [], ablations_train.start_run
    copy = lambda network: {name: value.clone() for name, value in network.state_dict().items()}

    def start_run(settings, world):
        run = honest(settings, world)

        def note(*_) -> None:
            students.append(copy(run.student))
            teachers.append(copy(run.teacher))

        run.teacher.register_forward_hook(note)
        return run

    monkeypatch.setattr(ablations_train, "start_run", start_run)
    ablations_train.main(
        [
            *FLAGS,
            *RUN,
            "--data_path",
            str(write_images(folder / "images")),
            "--output_dir",
            str(folder / "run"),
            "--teacher",
            kind,
            "--epochs",
            "3",
            "--lr",
            "9",
        ]
    )
    return students, teachers


@pytest.mark.usefixtures("no_report")
@pytest.mark.parametrize(
    ("kind", "source"),
    [
        ("student", [0, 1, 2, 3, 4]),
        ("previous_iteration", [0, 0, 1, 2, 3]),
        ("previous_epoch", [0, 0, 2, 2, 4]),
    ],
)
def test_fig_6s_teachers_are_the_student_of_the_step_that_their_name_says(
    kind, source, tmp_path, monkeypatch
):
    """Which step's student serves as the teacher in steps 0 ... 4, of two an epoch."""
    students, teachers = steps_of(kind, tmp_path, monkeypatch)
    assert not torch.equal(students[1]["backbone.cls_token"], students[2]["backbone.cls_token"]), (
        "nothing is trained"
    )
    for step, origin in enumerate(source):
        assert all(
            torch.equal(value, students[origin][name]) for name, value in teachers[step].items()
        ), f"in step {step} the teacher must be the student of step {origin}"


METHODS = {
    "BYOL": as_flags(BYOL_DEMO | PAIR_DEMO),
    "MoCo-v2": as_flags(MOCO_DEMO | PAIR_DEMO),
    "SwAV": as_flags(SWAV_DEMO),
}


@pytest.mark.parametrize("method", METHODS)
def test_each_methods_state_survives_a_checkpoint_and_another_methods_is_refused(method, tmp_path):
    settings = parse([*FLAGS, *METHODS[method], "--output_dir", str(tmp_path)])
    run = start_run(settings, HERE)
    crops = [torch.randn(4, 3, 32, 32) for _ in range(2)]
    train_step(
        run.student,
        run.teacher,
        run.dino_loss,
        run.optimizer,
        [crops],
        Schedules(0.01, 0.0, 0.9, 0.05),
        settings,
        HERE,
    )
    save_run(tmp_path / "checkpoint.pth", run, settings)
    again = start_run(settings, HERE)
    load_run(tmp_path / "checkpoint.pth", again, settings)
    for part in ("student", "teacher", "dino_loss"):
        for name, value in getattr(run, part).state_dict().items():
            assert torch.equal(getattr(again, part).state_dict()[name], value), (
                f"{part}'s {name} is lost"
            )
    for read, begin in (
        (parse, start_run),
        (parse_settings, run_state.start_run),
    ):  # by either command
        other = read([*FLAGS, "--output_dir", "nowhere"])
        with pytest.raises(ValueError, match="choose another --output_dir"):
            load_run(tmp_path / "checkpoint.pth", begin(other, HERE), other)


def test_another_length_of_the_queue_is_refused_by_its_flag(tmp_path):
    flags = [*FLAGS, "--loss", "infonce", "--output_dir", str(tmp_path), "--queue_length"]
    settings = parse([*flags, "17"])
    save_run(tmp_path / "checkpoint.pth", start_run(settings, HERE), settings)
    other = parse([*flags, "13"])
    with pytest.raises(InputError, match="was made with --queue_length 17, not 13: choose"):
        load_run(tmp_path / "checkpoint.pth", start_run(other, HERE), other)


def shapes_of(settings: AblationSettings) -> dict[str, tuple]:
    """Return the shape of every tensor that a run of these settings saves, one step done."""
    run = start_run(settings, HERE)
    for param in run.student.parameters():
        param.grad = torch.zeros_like(param)
    run.optimizer.step()
    found = {}
    for part in ("student", "teacher", "dino_loss"):
        for name, tensor in getattr(run, part).state_dict().items():
            found[f"{part}.{name}"] = tuple(tensor.shape)
    for number, state in run.optimizer.state_dict()["state"].items():
        for name, tensor in state.items():
            found[f"optimizer.{number}.{name}"] = tuple(tensor.shape)
    return found


def another_value(one: dataclasses.Field, value):
    """Return a value of a setting that differs from this one."""
    if "choices" in one.metadata:
        return next(choice for choice in one.metadata["choices"] if choice != value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value / 2 + 0.1
    return value[::-1]


@pytest.mark.parametrize("base", ["", "--loss infonce --queue_length 13 --predictor"])
def test_a_setting_that_changes_a_saved_tensor_s_shape_is_fixed(base):
    """So that another value is refused by its name, not by a list of keys and shapes."""
    settings = parse([*FLAGS, *base.split()])
    shapes = shapes_of(settings)
    for one in dataclasses.fields(settings):
        value = getattr(settings, one.name)
        if one.metadata.get("fixed") or (isinstance(value, str) and "choices" not in one.metadata):
            continue  # free text is a name of a file or a preset
        other = dataclasses.replace(settings, **{one.name: another_value(one, value)})
        assert shapes_of(other) == shapes, f"mark --{one.name} as fixed"


def test_each_setting_of_the_loss_makes_the_loss_it_names():
    for flags, kind in (
        ("", DINOLoss),
        ("--loss mse", SquaredDistance),
        ("--loss infonce --queue_length 5", InfoNCE),
    ):
        assert type(make_loss(parse([*FLAGS, *flags.split()]), HERE)) is kind
    for centering, iterations in (("sinkhorn", 3), ("batch_softmax", 1)):
        assert make_loss(parse([*FLAGS, "--centering", centering]), HERE).iterations == iterations


def test_a_predictor_starts_fresh_on_weights_that_have_none(tmp_path):
    settings = parse([*FLAGS, "--output_dir", str(tmp_path)])
    run = start_run(settings, HERE)
    save_run(tmp_path / "checkpoint.pth", run, settings)
    student = make_student(
        parse([*FLAGS, "--init_from", str(tmp_path / "checkpoint.pth"), "--predictor"]), HERE
    )
    torch.testing.assert_close(student.head.mlp.state_dict(), run.student.head.mlp.state_dict())
    assert student.head.predictor is not None


@pytest.mark.parametrize(
    ("made", "now", "named"),
    [
        ("--head_l2_bottleneck false", "", "--head_l2_bottleneck false"),
        ("--head_activation relu", "", "--head_activation relu"),
        (
            " ".join(as_flags(BYOL_DEMO)),
            "",
            "--head_l2_bottleneck false --head_activation relu",
        ),
        ("--head_activation relu", "--head_activation gelu --predictor", "--head_activation relu"),
        ("", "--head_l2_bottleneck false", "--head_l2_bottleneck true"),
    ],
)
def test_a_run_does_not_start_from_another_kind_of_head(made, now, named, tmp_path):
    """By either command, in a line that names all flags. relu and gelu have the same shapes."""
    path = tmp_path / "checkpoint.pth"
    settings = parse([*FLAGS, *made.split(), "--output_dir", str(tmp_path)])
    save_run(path, start_run(settings, HERE), settings)
    said = f"made with {named}: .*ablations.train {named} \\.\\.\\."
    flags = [*FLAGS, *now.split(), "--init_from", str(path)]
    with pytest.raises(InputError, match=said):
        make_student(parse(flags), HERE)
    if not now:
        with pytest.raises(InputError, match=said):
            build_student(parse_settings(flags))


@pytest.mark.parametrize("now", ["", "--predictor"])
def test_a_run_starts_from_the_teacher_of_a_student_with_a_predictor(now, tmp_path):
    """The teacher has none, and its head is the one that is read."""
    settings = parse([*FLAGS, "--predictor", "--output_dir", str(tmp_path)])
    made = start_run(settings, HERE)
    save_run(tmp_path / "checkpoint.pth", made, settings)
    flags = [*FLAGS, *now.split(), "--init_from", str(tmp_path / "checkpoint.pth")]
    student = make_student(parse(flags), HERE)
    heads = [student.head]
    if not now:
        heads.append(build_student(parse_settings(flags)).head)
    for head in heads:
        found = head.state_dict()
        for name, value in made.teacher.head.state_dict().items():
            assert torch.equal(found[name], value), name


def test_each_setting_of_the_ablations_has_its_plain_value_in_one_table():
    """Else train.py would continue an ablation's checkpoint as plain DINO."""
    plain_dino = {one.name for one in dataclasses.fields(Settings)}
    more = {}
    for one in dataclasses.fields(AblationSettings):
        if one.name not in plain_dino:
            more[one.name] = one.default
    assert ablated.PLAIN_DINO == more


def test_dino_starts_from_the_head_of_another_loss_or_teacher(tmp_path):
    """The head is DINO's there, so its weights fit."""
    settings = parse([*FLAGS, "--centering", "sinkhorn", "--teacher", "student"])
    save_run(tmp_path / "checkpoint.pth", start_run(settings, HERE), settings)
    build_student(parse_settings([*FLAGS, "--init_from", str(tmp_path / "checkpoint.pth")]))


def test_other_heads_than_the_weights_were_trained_with_are_refused(tmp_path):
    """No shape tells the number of heads."""
    settings = parse_settings([*FLAGS, "--num_heads", "8", "--output_dir", str(tmp_path)])
    save_run(tmp_path / "checkpoint.pth", run_state.start_run(settings, HERE), settings)
    with pytest.raises(ValueError, match="pass --num_heads 8"):
        build_student(parse_settings([*FLAGS, "--init_from", str(tmp_path / "checkpoint.pth")]))


def test_other_losses_are_logged_without_entropy_and_kl(tmp_path, capsys):
    """They have no such parts, so no collapse can be read off them."""
    ablations_train.main(
        [
            *FLAGS,
            *METHODS["BYOL"],
            *RUN,
            "--output_dir",
            str(tmp_path / "run"),
            "--data_path",
            str(write_images(tmp_path / "images")),
        ]
    )
    told, log = capsys.readouterr().out, (tmp_path / "run" / "log.txt").read_text()
    assert "steps of 4 an epoch; K = 256\n" in told
    assert "train_loss" in log and not any(
        word in told + log for word in ("KL", "COLLAPSE", "train_kl", "ln K")
    )
    assert (tmp_path / "run" / "curves.png").stat().st_size
