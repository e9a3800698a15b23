"""The projection head: names, normalisations, the frozen gain."""

import pytest
import torch

from head import DINOHead


def small_head(**changes) -> DINOHead:
    torch.manual_seed(0)
    return DINOHead(
        **{"in_dim": 11, "out_dim": 23, "hidden_dim": 13, "bottleneck_dim": 7, "init_std": 0.3}
        | changes
    )


def test_logits_are_cosines_with_the_prototypes():
    head, features = small_head(), torch.randn(5, 11)
    bottleneck = head.mlp(features)
    for i, prototype in enumerate(head.last_layer.weight_v):
        cosine = torch.cosine_similarity(bottleneck, prototype.unsqueeze(0))
        torch.testing.assert_close(
            head(features)[:, i],
            cosine,
            msg="a logit must be the cosine of the bottleneck and "
            "its prototype: normalise each image's bottleneck, along its last axis",
        )


def test_the_gain_scales_the_logits_of_its_prototype():
    head, features = small_head(norm_last_layer=False), torch.randn(5, 11)
    before = head(features)
    head.last_layer.weight_g.data[4] = 3.0
    torch.testing.assert_close(head(features)[:, 4], 3 * before[:, 4])


def test_norm_last_layer_freezes_the_gain_at_one():
    assert not small_head().last_layer.weight_g.requires_grad
    assert small_head(norm_last_layer=False).last_layer.weight_g.requires_grad
    assert small_head().last_layer.weight_g.eq(1).all()


def test_names_are_the_releases():
    assert set(small_head().state_dict()) == {
        "mlp.0.weight",
        "mlp.0.bias",
        "mlp.2.weight",
        "mlp.2.bias",
        "mlp.4.weight",
        "mlp.4.bias",
        "last_layer.weight_g",
        "last_layer.weight_v",
    }
    with_bn = set(small_head(use_bn=True).state_dict())
    assert {"mlp.1.running_mean", "mlp.4.running_mean", "mlp.3.weight", "mlp.6.weight"} <= with_bn
    assert {"mlp.weight", "mlp.bias"} < set(small_head(nlayers=1).state_dict())


@pytest.mark.parametrize("nlayers", [1, 2, 3, 4])
@pytest.mark.parametrize("use_bn", [False, True])
def test_every_depth_ends_in_a_bottleneck_without_activation(nlayers, use_bn):
    head = small_head(nlayers=nlayers, use_bn=use_bn)
    assert head(torch.randn(3, 11)).shape == (3, 23)
    last = head.mlp if nlayers == 1 else head.mlp[-1]
    assert isinstance(last, torch.nn.Linear) and last.out_features == 7


def test_a_head_without_layers_is_refused():
    with pytest.raises(ValueError, match="at least one layer"):
        small_head(nlayers=0)
