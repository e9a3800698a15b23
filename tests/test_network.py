"""What needs the internet: pytest -m network. Everything else in the suite does without."""

import io
import urllib.request

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from data import decode
from features import normalise
from runtime.augment import IMAGENET_MEAN, IMAGENET_STD
from training.backbone import build_backbone
from training.checkpoint import load_backbone
from training.pretrained import download_pretrained

pytestmark = pytest.mark.network

CATS = "http://images.cocodataset.org/val2017/000000039769.jpg"
SIDE = 480
# the first three numbers of [CLS] and of the first two patches, as transformers' own test has them
KNOWN = torch.tensor([
    [4.2325, 4.3882, -6.6678],
    [4.5372, 1.8933, -6.7355],
    [4.4454, 0.8514, -5.8747],
])


@torch.no_grad()
def test_the_authors_vit_s_8_gives_the_known_output_on_two_cats():
    """facebook/dino-vits8 on a COCO image at 480 pixels: the last block's tokens after the norm.

    There the positions are resized to the grid's own size, so they are here. Ours follow the
    release, whose scale is (side + 0.1) / 28: a little other numbers. Their LayerNorm's eps is
    1e-12, ours 1e-6.
    """
    released, _ = load_backbone(download_pretrained("dino_vits8"))
    weights = released.state_dict()
    grid = weights["pos_embed"][:, 1:].transpose(1, 2).unflatten(2, (28, 28))
    resized = F.interpolate(grid, (SIDE // 8, SIDE // 8), mode="bicubic", align_corners=False)
    patches = resized.flatten(2).transpose(1, 2)
    weights["pos_embed"] = torch.cat([weights["pos_embed"][:, :1], patches], dim=1)
    network = build_backbone("vit_small", 8, SIDE).eval()
    network.load_state_dict(weights)

    with urllib.request.urlopen(CATS, timeout=60) as answer:
        cats = Image.open(io.BytesIO(answer.read()))
    stretched = io.BytesIO()
    cats.resize((SIDE, SIDE), Image.BILINEAR).save(stretched, "PNG")
    view = normalise(decode(stretched.getvalue()), IMAGENET_MEAN, IMAGENET_STD)

    tokens = network.get_intermediate_layers(view.unsqueeze(0), 1)[0]
    torch.testing.assert_close(tokens[0, :3, :3], KNOWN, atol=1e-3, rtol=0)

    by_the_release = released.get_intermediate_layers(view.unsqueeze(0), 1)[0]
    torch.testing.assert_close(by_the_release[0, :3, :3], KNOWN, atol=0.1, rtol=0)
