"""The step that a CUDA graph records is train.py's: tensors in the place of floats.

Recording and replaying need a GPU; here the step that would be recorded is made as it is.
"""

import copy

import pytest
import torch
from torch import nn

import train
from bench import step as bench_step
from optimizer import make_optimizer, parameter_groups
from runtime.commandline import InputError
from runtime.hardware import World
from settings import parse_settings
from teacher import update_teacher
from train import Schedules, set_schedules, train_step
from training import cuda_graph
from training.run_state import prepare_step, start_run

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU, torch.float32)
TINY = (
    "--preset demo --device cpu --precision fp32 --batch_size_per_gpu 4 --out_dim 13 "
    "--global_crops_size 24 --local_crops_size 16 --local_crops_number 2 --use_bn_in_head false"
).split()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_adamw_with_tensors_is_adamw():
    """With a rate and a decay that change, on weights that decay and others; one has no gradient.

    Its groups keep floats, as a checkpoint has them.
    """
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(7, 5), nn.LayerNorm(5), nn.Linear(5, 3))
    theirs = copy.deepcopy(ours)
    lr = torch.tensor(0.0)
    decay = torch.tensor(0.0)
    inner = make_optimizer("adamw", ours)
    tensor_adamw = cuda_graph.TensorAdamW(inner, lr, decay)
    adamw = torch.optim.AdamW(parameter_groups(theirs), lr=0.0)
    before = copy.deepcopy(inner.state_dict()["param_groups"])
    for step in range(1, 4):
        lr.fill_(0.01 * step)
        decay.fill_(0.1 * step)
        for group in adamw.param_groups:
            group["lr"] = 0.01 * step
            if group["decays"]:
                group["weight_decay"] = 0.1 * step
        for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            one.grad = torch.randn(one.shape, generator=generator(step))
            other.grad = one.grad.clone()
        ours[2].weight.grad = None
        theirs[2].weight.grad = None
        tensor_adamw.step()
        adamw.step()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other)
    assert inner.state_dict()["param_groups"] == before


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_step_from_tensors_is_the_step(accumulate, monkeypatch):
    """Frozen, then with the last layer; values and crops change from step to step."""
    monkeypatch.setattr(cuda_graph, "beside", lambda step: step())  # a CPU has no streams
    # a bias before a batch normalisation has no gradient but rounding, which Adam makes large
    settings = parse_settings(TINY)
    runs = []
    for as_graph in (False, True):
        torch.manual_seed(1)
        run = start_run(settings, ALONE)
        step = train_step
        if as_graph:
            step = cuda_graph.GraphStep(train_step, run.optimizer, CPU)
        metrics = []
        for number, frozen in enumerate((True, True, False, False)):
            torch.manual_seed(number)
            micro_batches = []
            for _ in range(accumulate):
                micro_batches.append(bench_step.random_crops(settings, ALONE))
            lr = 0.01 * (1 + number)
            now = Schedules(lr, 0.2, 0.9 - 0.1 * number, 0.05 + 0.01 * number, frozen)
            set_schedules(run.optimizer, now)
            values = step(
                run.student, run.teacher, run.dino_loss, run.optimizer,
                micro_batches, now, settings, ALONE, update_teacher,
            )  # fmt: skip
            metrics.append(values)
            assert run.optimizer.param_groups[0]["lr"] == lr, "a float, for the checkpoint"
        runs.append((run, torch.stack(metrics)))
    (eager, eager_metrics), (graph, graph_metrics) = runs
    torch.testing.assert_close(graph_metrics, eager_metrics, atol=1e-3, rtol=1e-3)
    for part in ("student", "teacher", "dino_loss"):
        weights = getattr(graph, part).state_dict()
        for name, wanted in getattr(eager, part).state_dict().items():
            if name.endswith("qkv.bias"):
                continue  # nor has the keys'
            error = (weights[name] - wanted).abs().max().item()
            assert error < 5e-3, f"{part}.{name} differs by {error}"


@pytest.mark.parametrize(
    ("world", "flags", "said"),
    [
        (ALONE, "", "--cuda_graph true needs a GPU"),
        (World(0, 2, torch.device("cuda"), torch.bfloat16), "", "is for one process"),
        (World(0, 1, torch.device("cuda"), torch.float16), "--precision fp16", "take bf16"),
        (
            World(0, 1, torch.device("cuda"), torch.bfloat16),
            "--optimizer sgd",
            "--optimizer sgd has no CUDA graph here",
        ),
    ],
)
def test_where_there_is_no_graph_a_line_says_so(world, flags, said):
    settings = parse_settings([*TINY, "--cuda_graph", "true", *flags.split()])
    run = start_run(settings, ALONE)
    with pytest.raises(InputError, match=said):
        prepare_step(train_step, run, settings, world)


def test_without_the_flag_it_is_train_step():
    settings = parse_settings(TINY)
    assert prepare_step(train_step, start_run(settings, ALONE), settings, ALONE) is train_step


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")
def test_a_training_as_a_graph_is_the_training(tmp_path):
    """On a GPU: recorded with the last layer frozen and again without, replayed, continued."""
    losses = []
    for name, graph in (("eager", "false"), ("graph", "true")):
        flags = [*TINY, "--device", "cuda", "--compile", "false", "--cuda_graph", graph]
        flags += "--batch_size_per_gpu 256 --warmup_epochs 0 --knn_every 0 --epochs".split()
        for epochs in ("1", "2"):
            train.main([*flags, epochs, "--output_dir", str(tmp_path / name)])
        state = torch.load(tmp_path / name / "checkpoint.pth", weights_only=True)
        losses.append([epoch["train_loss"] for epoch in state["history"][1:]])
    eager, graph = losses
    assert graph == pytest.approx(eager, rel=0.02)
