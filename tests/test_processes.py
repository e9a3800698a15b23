"""Two processes compute together what one computes alone, also where there is nothing to do for one of the two."""
import importlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_attention_segmentation import write_voc
from test_copy_detection import save_creatures
from test_video import write_davis

import eval_copy_detection
from backbone import build_backbone

REPO = Path(__file__).parent.parent
EVALUATIONS = {
    "k-NN": "eval_knn --data_path {data}/photos --nb_knn 3 5",
    "k-NN, one picture asked": "eval_knn --data_path {data}/photos/few --nb_knn 1 5",
    "retrieval": "eval_image_retrieval --data_path {data}/photos",
    "copies, one distractor": "eval_copy_detection --data_path {data}/copies --distractors {data}/one --whiten "
                              "{data}/photos",
    "attention": "eval_attention_segmentation --data_path {data}/voc",
    "attention, the first picture without objects": "eval_attention_segmentation --data_path {data}/voc_of_two",
    "attention, one picture": "eval_attention_segmentation --data_path {data}/voc_of_one",
    "videos": "eval_video_segmentation --data_path {data}/davis --overlay false --output_dir {output}",
    "one video": "eval_video_segmentation --data_path {data}/davis_of_one --overlay false --output_dir {output}",
}
DRIVER = """
import importlib, json, os, sys
os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
for port, script, *flags in json.load(open(sys.argv[1])):
    os.environ["MASTER_PORT"] = port  # of its own: the last run's would still tell the addresses that this one left
    importlib.import_module(script).main(flags)
"""


def write_data(data: Path) -> None:
    """Weights, labelled pictures, copies with one distractor, masks and videos."""
    torch.manual_seed(0)
    for i, (name, n) in enumerate((("few/fish", 3), ("few/snail", 4), ("more/leaf", 11), ("more/turtle", 13))):
        save_creatures(data / "photos" / name, n, seed=i)
    torch.save(build_backbone("vit_nano", 8, 48, init_std=0.2).state_dict(), data / "weights.pth")
    save_creatures(data / "one", 1, seed=4)
    eval_copy_detection.main(["--make", str(data / "copies"), "--data_path", str(data / "photos/few"), "--device",
                              "cpu"])
    for name, listed in (("voc", "one\nnone\nthree\n"), ("voc_of_two", "none\nthree\n"), ("voc_of_one", "three\n")):
        (write_voc(data / name) / "ImageSets/Segmentation/val.txt").write_text(listed)
    write_davis(data / "davis")
    (write_davis(data / "davis_of_one") / "ImageSets/2017/val.txt").write_text("snail\n")


def commands(folder: Path, processes: int) -> list[list[str]]:
    """Script and flags of each run, as so many processes are to make it, into FOLDER/PROCESSES/NAME."""
    runs = []
    for name, command in EVALUATIONS.items():
        output = folder / str(processes) / name
        script, *flags = [word.format(data=folder / "data", output=output) for word in command.split()]
        flags += ["--pretrained_weights", str(folder / "data/weights.pth"), "--eval_size", "32", "--device", "cpu",
                  "--results", str(output / "results.jsonl")]
        runs.append([script, *flags, *([] if "video" in script else ["--num_workers", "0"])])
    return runs


@pytest.fixture(scope="module")
def outputs(tmp_path_factory) -> Path:
    """The folder where all runs were made, by two processes of one launch and meanwhile by this one."""
    folder = tmp_path_factory.mktemp("processes")
    write_data(folder / "data")
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in commands(folder, 2)]
    ports = [str(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    (folder / "driver.py").write_text(DRIVER)
    (folder / "commands.json").write_text(json.dumps([[port, *run] for port, run in zip(ports, commands(folder, 2))]))
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    with subprocess.Popen([sys.executable, *"-m torch.distributed.run --standalone --nproc_per_node=2".split(),
                           folder / "driver.py", folder / "commands.json"], cwd=REPO, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, env=environment | {"PYTHONPATH": str(REPO)}) as both:
        for script, *flags in commands(folder, 1):
            importlib.import_module(script).main(flags)
        said, _ = both.communicate(timeout=300)
    assert both.returncode == 0, said
    return folder


def result(output: Path) -> dict:
    """The one line of results."""
    lines = (output / "results.jsonl").read_text().splitlines()
    assert len(lines) == 1, f"one process alone tells what was measured, not {len(lines)}"
    return json.loads(lines[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", EVALUATIONS)
def test_an_evaluation_tells_the_same_figures_from_two_processes(outputs, name):
    """And writes the same files; a process without a picture, an object or a video takes part as well."""
    one, two = (outputs / processes / name for processes in "12")
    alone, together = result(one), result(two)
    assert together["measured"] == pytest.approx(alone["measured"], abs=1e-3)
    assert {**together, "measured": 0, "flags": 0, "time": 0} == {**alone, "measured": 0, "flags": 0, "time": 0}
    written = [sorted(path.relative_to(output) for path in output.rglob("*")) for output in (one, two)]
    assert written[0] == written[1]
