"""Networks: shapes, sizes and structure as published."""

import pytest
import torch
from torch import nn

from data_prep.errors import UserError
from semi_fast.nets import build_net


def parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def test_wrn28_2_has_the_published_size():
    net = build_net("wrn28_2", bn_momentum=0.001)
    # 1.47 million with a linear head of 10 classes on 128 features
    assert parameters(net) + 128 * 10 + 10 == 1_467_610
    assert net.num_features == 128
    assert net(torch.randn(2, 3, 32, 32)).shape == (2, 128)
    assert sum(isinstance(m, nn.Conv2d) for m in net.modules()) == 28


def test_resnet50_keeps_the_resolution_in_its_stem():
    net = build_net("resnet50", bn_momentum=0.1).eval()
    # torchvision's 25,557,032 less its head (2,049,000) and its 7x7 stem's surplus (64 * 3 * 40)
    assert parameters(net) == 25_557_032 - 2_049_000 - 64 * 3 * 40
    sides = []
    for block in net.blocks:
        block.register_forward_hook(lambda m, i, o: sides.append(o.shape[-1]))
    with torch.no_grad():
        assert net(torch.randn(1, 3, 32, 32)).shape == (1, 2048)
    assert sides == [32] * 3 + [16] * 4 + [8] * 6 + [4] * 3


def test_batchnorm_momentum_reaches_every_layer():
    for name in ("wrn10_1", "resnet50"):
        layers = [m for m in build_net(name, bn_momentum=0.25).modules() if isinstance(m, nn.BatchNorm2d)]
        assert layers
        assert {m.momentum for m in layers} == {0.25}


def test_first_block_activates_before_its_residual_and_the_others_do_not():
    net = build_net("wrn16_1", bn_momentum=0.1)
    blocks = list(net.blocks)
    assert [b.first for b in blocks] == [True] + [False] * 5
    for block in blocks:
        nn.init.zeros_(block.conv2.weight)  # what is left is the residual path
        block.eval()
    x = torch.randn(2, 16, 8, 8)
    torch.testing.assert_close(blocks[0](x), nn.functional.leaky_relu(blocks[0].bn1(x), 0.1))
    torch.testing.assert_close(blocks[1](x), x)


def test_raw_transitions_feed_the_first_convolution_of_groups_2_and_3_from_the_bare_sum():
    torch.manual_seed(0)
    net = build_net("wrn16_2", bn_momentum=0.1, raw_transitions=True)
    assert [block.bn1 is None for block in net.blocks] == [False, False, True, False, True, False]
    inputs = {}
    for i in (2, 4):
        net.blocks[i].conv1.register_forward_hook(lambda m, x, y, i=i: inputs.update({i: x[0]}))
        net.blocks[i - 1].register_forward_hook(lambda m, x, y, i=i: inputs.update({-i: y}))
    net(torch.randn(2, 3, 16, 16)).sum().backward()
    assert all(inputs[i] is inputs[-i] for i in (2, 4))
    assert (inputs[2] < -1).any(), "an activation would have shrunk what is negative"
    assert all(p.grad is not None for p in net.parameters()), "several processes need a gradient of every parameter"


def test_raw_transitions_are_those_of_the_released_block():
    """h = conv2(act(bn2(conv1(x)))) + shortcut(x), nothing normalized before conv1."""
    torch.manual_seed(0)
    block = build_net("wrn10_2", bn_momentum=0.1, raw_transitions=True).blocks[1].eval()
    x = torch.randn(2, 32, 8, 8)
    inner = nn.functional.leaky_relu(block.bn2(block.conv1(x)), 0.1)
    torch.testing.assert_close(block(x), block.conv2(inner) + block.shortcut(x))


def test_the_default_network_is_pre_activated_and_has_two_batchnorms_more():
    torch.manual_seed(0)
    default = build_net("wrn28_2", bn_momentum=0.1)
    torch.manual_seed(0)
    raw = build_net("wrn28_2", bn_momentum=0.1, raw_transitions=True)
    assert parameters(default) - parameters(raw) == 2 * (32 + 64)
    assert all(torch.equal(t, default.state_dict()[name]) for name, t in raw.state_dict().items())
    x = torch.randn(2, 3, 32, 32)
    assert not torch.allclose(default(x), raw(x))


def test_raw_transitions_of_a_residual_network_are_refused():
    with pytest.raises(UserError, match=r"net\.raw_transitions is for wrn<depth>_<width>, got net=resnet50"):
        build_net("resnet50", bn_momentum=0.1, raw_transitions=True)


def test_weights_are_channels_last():
    assert build_net("wrn10_1", bn_momentum=0.1).blocks[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", ["wrn28", "resnet18", "wrn27_2", "wrn4_1", "wrn10_0"])
def test_unknown_networks_are_refused(name):
    with pytest.raises(UserError, match=r"net|depth"):
        build_net(name, bn_momentum=0.1)
