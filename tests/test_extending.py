"""docs/extending.md: its loss trains as it stands there, its study runs, its places exist."""

import ast
import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from test_methods import FLAGS, RUN, write_images

from ablations import rows
from ablations.train import parse

REPO = Path(__file__).parent.parent
PAGE = (REPO / "docs/extending.md").read_text(encoding="utf-8")
LOSS, STUDY = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
PLACES = sorted(set(re.findall(r"`([\w/]+\.py):(\w+)`", PAGE)))


@pytest.fixture
def script(tmp_path) -> str:
    """The page's loss as the file that it asks for."""
    file = tmp_path / "my_loss.py"
    file.write_text(LOSS)
    return str(file)


def test_the_loss_trains_and_is_logged(script, tmp_path, monkeypatch, capsys):
    images = write_images(tmp_path / "images")
    output = tmp_path / "run"
    flags = [*FLAGS, *RUN, "--data_path", str(images), "--output_dir", str(output)]
    monkeypatch.setattr(sys, "argv", [script, *flags])
    runpy.run_path(script, run_name="__main__")
    log = [json.loads(line) for line in (output / "log.txt").read_text().splitlines()]
    assert [record["epoch"] for record in log] == [-1, 0, 1]
    # a tenth of the targets is uniform over 31: entropy and cross-entropy are above its part
    assert log[-1]["train_entropy"] > 0.1 * torch.tensor(31.0).log()
    assert "continuing" not in capsys.readouterr().out
    runpy.run_path(script, run_name="__main__")
    assert "is finished" in capsys.readouterr().out


def test_its_targets_are_smoothed(script):
    """0.9 softmax((g - c) / tau) + 0.1 / K, by hand."""
    K = 7
    loss_fn = runpy.run_path(script)["SmoothedLoss"](K)
    logits = torch.randn(6, K)
    targets = loss_fn.teacher_probs(logits, 0.5)
    by_hand = 0.9 * (logits / 0.5).exp() / (logits / 0.5).exp().sum(dim=-1, keepdim=True) + 0.1 / K
    torch.testing.assert_close(targets, by_hand)


def test_the_study_has_allowed_settings():
    (study,) = eval(f"{{{STUDY}}}", vars(rows)).values()
    found = [parse(rows.as_flags(row.settings)).student_temp for row in study.rows]
    assert [row.name for row in study.rows] == [str(temp) for temp in found]


@pytest.mark.parametrize(("file", "name"), PLACES)
def test_each_place_that_is_named_is_there(file, name):
    names = set()
    for node in ast.parse((REPO / file).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    assert name in names, f"docs/extending.md names {file}:{name}, which is not there"
