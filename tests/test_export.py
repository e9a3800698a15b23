"""The backbone in other programs: exported graphs take any batch, and timm reads the weights."""

import importlib.util

import pytest
import torch
from torch import Tensor, nn

from training.backbone import build_backbone
from vit import vit_base, vit_small, vit_tiny

pytestmark = pytest.mark.filterwarnings("ignore")  # tracing and ONNX warn of their own end

# What timm 1.0's vit_*_patch*_224 has with num_classes=0, "*" for the number of a block.
TIMMS_KEYS = {
    "cls_token",
    "pos_embed",
    "patch_embed.proj.weight",
    "patch_embed.proj.bias",
    "blocks.*.norm1.weight",
    "blocks.*.norm1.bias",
    "blocks.*.attn.qkv.weight",
    "blocks.*.attn.qkv.bias",
    "blocks.*.attn.proj.weight",
    "blocks.*.attn.proj.bias",
    "blocks.*.norm2.weight",
    "blocks.*.norm2.bias",
    "blocks.*.mlp.fc1.weight",
    "blocks.*.mlp.fc1.bias",
    "blocks.*.mlp.fc2.weight",
    "blocks.*.mlp.fc2.bias",
    "norm.weight",
    "norm.bias",
}


def backbone_and_images(arch: str, size: int) -> tuple[nn.Module, Tensor, Tensor]:
    """Return a network, the batch of 2 that it is exported with, and a batch of 5."""
    torch.manual_seed(0)
    backbone = build_backbone(arch, 8, 64).eval().requires_grad_(False)
    return backbone, torch.randn(2, 3, size, size), torch.randn(5, 3, size, size)


# 64: the learnt grid of positions; 40: an interpolated one; a convnet has no grid
NETWORKS = [("vit_nano", 64), ("vit_nano", 40), ("resnet18", 32)]


@pytest.mark.skipif(
    torch.__version__ < torch.torch_version.TorchVersion("2.11"),
    reason="torch.export of 2.6 and 2.7 wants bounds of the batch; 2.8 to 2.10 were not tried",
)
@pytest.mark.parametrize("arch, size", NETWORKS)
def test_an_exported_program_takes_any_batch(arch, size):
    backbone, two, five = backbone_and_images(arch, size)
    batch = torch.export.Dim("batch")
    exported = torch.export.export(backbone, (two,), dynamic_shapes=({0: batch},)).module()
    for images in (five, five[:1]):
        torch.testing.assert_close(exported(images), backbone(images))


@pytest.mark.parametrize("arch, size", NETWORKS)
def test_a_traced_network_takes_any_batch(arch, size):
    backbone, two, five = backbone_and_images(arch, size)
    traced = torch.jit.trace(backbone, two)
    for images in (five, five[:1]):
        torch.testing.assert_close(traced(images), backbone(images))


@pytest.mark.parametrize("arch, size", NETWORKS)
def test_an_onnx_file_takes_any_batch(arch, size, tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    import onnxruntime

    backbone, two, five = backbone_and_images(arch, size)
    batch = torch.export.Dim("batch")
    file = tmp_path / "backbone.onnx"
    torch.onnx.export(backbone, (two,), file, dynamo=True, dynamic_shapes=({0: batch},))
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    for images in (five, five[:1]):
        (features,) = session.run(None, {name: images.numpy()})
        torch.testing.assert_close(
            torch.from_numpy(features), backbone(images), atol=1e-4, rtol=1e-4
        )


def test_the_weights_have_timms_names():
    for backbone in (vit_tiny(16), vit_small(16), vit_base(8)):
        names = set()
        for name in backbone.state_dict():
            parts = ["*" if part.isdecimal() else part for part in name.split(".")]
            names.add(".".join(parts))
        assert names == TIMMS_KEYS


@pytest.mark.skipif(not importlib.util.find_spec("timm"), reason="timm is not installed")
@pytest.mark.parametrize("patch", [8, 16])
def test_timm_computes_the_same_features_from_the_weights(patch):
    import timm

    torch.manual_seed(0)
    ours = vit_small(patch).eval()
    theirs = timm.create_model(f"vit_small_patch{patch}_224", num_classes=0).eval()
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(theirs(images), ours(images), atol=1e-5, rtol=1e-5)
