"""CDMAD: the bias and that it leaves no trace in the network, pseudo-labels and predictions without it."""

from __future__ import annotations

import copy

import pytest
import torch

from semi_fast.methods import Context, build_method
from semi_fast.nets import build_net
from semi_fast.parts.forward import eval_features, forward_jointly
from tests.semi_fast.tiny import CLASSES, tiny_batch, tiny_context, tiny_info, tiny_method, tiny_step


def biased(**options):
    """A tiny method whose network has seen some images, so that both modes of BatchNorm differ."""
    method = tiny_method("cdmad", **options)
    for seed in range(3):
        method.net(tiny_batch(method, seed=seed).images + 1)
    return method


def bias_of(method):
    """b, by a copy."""
    twin = copy.deepcopy(method).eval()
    with torch.no_grad():
        return twin.heads["standard"](twin.net(torch.ones(1, 3, 4, 4)))[0]


@pytest.mark.parametrize(("epoch", "tau", "views"), [(100, 0.0, 2), (101, 0.0, 2), (499, 0.4, 1)])
def test_the_loss_is_the_slow_versions(epoch, tau, views):
    method = biased(tau=tau, strong_views=views)
    batch, bias = tiny_batch(method), bias_of(method)
    with torch.no_grad():
        joint = forward_jointly(copy.deepcopy(method.net), method.heads, batch)
    weak, strong = (joint["unlabeled"][view].logits["standard"] for view in ("weak", "strong"))
    total, used, changed = 0.0, 0, 0
    for u in range(len(weak)):
        scores = [float(weak[u, k]) - (float(bias[k]) if epoch >= 101 else 0.0) for k in range(CLASSES)]
        q = torch.tensor(scores).softmax(0)
        changed += int(q.argmax() != weak[u].argmax())
        if q.max() < tau:
            continue
        used += 1
        for v in range(views):
            log_p = strong[v * len(weak) + u].log_softmax(0)
            total -= sum(float(q[k]) * float(log_p[k]) for k in range(CLASSES))
    out = tiny_step(method, batch, Context(epoch, epoch, epoch / 500))
    assert out.logs["loss/unlabeled"].item() == pytest.approx(total / (views * len(weak)), rel=1e-5)
    labeled = joint["labeled"]["weak"].logits["standard"].log_softmax(1)
    expected = -labeled[torch.arange(len(labeled)), batch.labels["labeled"]].mean()
    torch.testing.assert_close(out.logs["loss/labeled"], expected)
    assert out.logs["pseudo/used"].item() == pytest.approx(used / len(weak))
    assert (changed > 0) == (epoch >= 101)
    assert (used < len(weak)) == (tau > 0)


def test_batchnorm_does_not_see_the_image_without_content():
    method, plain = biased(), biased()
    batch = tiny_batch(method)
    with torch.no_grad():
        forward_jointly(plain.net, plain.heads, batch)
    tiny_step(method, batch, tiny_context(400))
    assert all(torch.equal(x, plain.net.state_dict()[key]) for key, x in method.net.state_dict().items())


def test_every_module_is_left_in_its_mode_even_after_an_error():
    net = build_net("wrn10_1", bn_momentum=0.1)
    net.blocks[1].eval()
    before = [module.training for module in net.modules()]
    eval_features(net, torch.randn(2, 3, 8, 8))
    assert [module.training for module in net.modules()] == before
    with pytest.raises(RuntimeError):
        eval_features(net, torch.randn(2, 4, 8, 8))
    assert [module.training for module in net.modules()] == before
    assert len(set(before)) == 2


def test_gradients_are_whole_under_autocast():
    """A weight that autocast keeps from a forward without gradient would get none."""
    method, plain = biased(), biased()
    batch = tiny_batch(method)
    with torch.autocast("cpu", torch.bfloat16):
        loss = tiny_step(method, batch, tiny_context(0)).loss
        prepared = plain.prepare(batch, plain.inputs(batch, tiny_context(0)), None)[1]
    loss.backward()
    with torch.autocast("cpu", torch.bfloat16):  # in a context of its own
        joint = forward_jointly(plain.net, plain.heads, batch)
    plain.objective(joint, batch.labels, batch.rows, prepared).loss.backward()
    for key, parameter in plain.named_parameters():
        assert parameter.grad.abs().sum() > 0
        torch.testing.assert_close(method.get_parameter(key).grad, parameter.grad, msg=key)


def test_predictions_come_with_the_bias_and_without():
    method = biased().eval()
    x = torch.randn(7, 3, 4, 4)
    predictions = method.predict(x)
    assert list(predictions) == ["debiased", "standard"]
    assert method.reported == "debiased"
    torch.testing.assert_close(predictions["standard"], method.heads["standard"](method.net(x)))
    torch.testing.assert_close(predictions["debiased"], predictions["standard"] - bias_of(method))
    other = copy.deepcopy(method)
    with torch.no_grad():
        other.heads["standard"].bias.add_(torch.arange(5.0))
    torch.testing.assert_close(other.predict(x)["debiased"], predictions["debiased"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(method.statistics(6)["cdmad/bias"], bias_of(method).softmax(0))


def test_the_image_is_as_large_as_the_data():
    method = build_method("cdmad", build_net("wrn10_1", bn_momentum=0.1), tiny_info()._replace(resolution=16))
    assert method.blank.shape == (1, 3, 16, 16)
    assert (method.blank == 1).all()
    assert "blank" not in method.state_dict()
