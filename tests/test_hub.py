"""torch.hub.load gives the authors' networks by name, and ours by checkpoint."""

import hashlib
from pathlib import Path

import pytest
import torch

import hubconf
from runtime.commandline import InputError
from training import pretrained
from training.backbone import build_backbone
from vit import vit_nano

REPO = Path(__file__).parent.parent


def put_in_the_hubs_cache(network: torch.nn.Module, name: str, folder: Path, monkeypatch) -> None:
    """Lay a file where the download would lie, under its name, and make its hash the known one."""
    monkeypatch.setenv("TORCH_HOME", str(folder))
    file = pretrained.PRETRAINED[name][0]
    path = folder / "hub" / "checkpoints" / f"{file}.pth"
    path.parent.mkdir(parents=True)
    torch.save(network.state_dict(), path)
    digest = hashlib.md5(path.read_bytes()).hexdigest()
    monkeypatch.setitem(pretrained.PRETRAINED, name, (file, "md5", digest))


def test_our_checkpoints_load_by_hub_for_teacher_and_student(tmp_path):
    torch.manual_seed(0)
    networks = {"teacher": vit_nano(8), "student": vit_nano(8)}
    weights = {}
    for key, network in networks.items():
        weights[key] = {f"backbone.{name}": value for name, value in network.state_dict().items()}
    torch.save(weights | {"args": {"arch": "vit_nano"}}, tmp_path / "checkpoint.pth")
    images = torch.randn(3, 3, 64, 64)
    for key, network in networks.items():
        loaded = torch.hub.load(
            str(REPO), "dino", source="local", checkpoint=str(tmp_path / "checkpoint.pth"), key=key
        )
        torch.testing.assert_close(loaded(images), network.eval()(images), rtol=0, atol=0)


@pytest.mark.parametrize("name", pretrained.PRETRAINED)
def test_each_name_of_the_authors_weights_loads_its_own_file(name, tmp_path, monkeypatch):
    """The file's weights decide the network, so that a small one may stand for a large one here."""
    network = vit_nano(8)
    put_in_the_hubs_cache(network, name, tmp_path, monkeypatch)
    loaded = torch.hub.load(str(REPO), name, source="local")
    for parameter, value in network.state_dict().items():
        assert torch.equal(loaded.state_dict()[parameter], value), f"{name} has another {parameter}"
    assert not loaded.training, "a network from the hub is in evaluation mode"
    assert all(parameter.requires_grad for parameter in loaded.parameters()), "it can be fine-tuned"


@pytest.mark.parametrize(
    ("name", "arch", "patch_size", "width"),
    [
        ("dino_vits16", "vit_small", 16, 384),
        ("dino_vits8", "vit_small", 8, 384),
        ("dino_vits8_300ep", "vit_small", 8, 384),
        ("dino_vitb16", "vit_base", 16, 768),
        ("dino_vitb8", "vit_base", 8, 768),
        ("dino_resnet50", "resnet50", 16, 2048),
    ],
)
def test_without_pretrained_it_is_the_same_network_untrained(name, arch, patch_size, width):
    """Table 1's network, whose weights' names and shapes are those of the released file."""
    with torch.device("meta"):  # shapes only
        network = getattr(hubconf, name)(pretrained=False)
        named = build_backbone(arch, patch_size)
    assert network.embed_dim == width
    assert {key: value.shape for key, value in network.state_dict().items()} == {
        key: value.shape for key, value in named.state_dict().items()
    }


def test_the_hub_offers_every_name_that_the_command_line_takes():
    for name in pretrained.PRETRAINED:
        assert callable(getattr(hubconf, name, None)), f"hubconf.py lacks {name}"


def test_a_checkpoint_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(InputError, match="no checkpoint at"):
        hubconf.dino(str(tmp_path / "nothing.pth"))
