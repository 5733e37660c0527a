"""The contract of every method, the checks of its options, and the one joint forward."""

from __future__ import annotations

import contextlib
import inspect
import math
import sys

import pytest
import torch
from torch import nn

from data_prep.errors import UserError
from semi_fast import methods
from semi_fast.methods import Context, build_method, check_options, method_class, method_names
from semi_fast.methods.base import EPOCHS, two_streams
from semi_fast.parts.figures import Figure
from semi_fast.parts.forward import forward_jointly, linear_head
from tests.semi_fast.sync_trap import SyncTrap
from tests.semi_fast.tiny import (
    CLASSES,
    COUNTS,
    FEATURES,
    TinyNet,
    tiny_batch,
    tiny_context,
    tiny_info,
    tiny_method,
    tiny_step,
    to_device,
)

NAMES = method_names()
LATE = tiny_context(400)


def test_the_methods_are_the_files_of_the_folder():
    assert {"supervised", "fixmatch", "semi"} <= set(NAMES)
    assert "base" not in NAMES


@pytest.mark.parametrize("name", NAMES)
class TestContract:
    def test_loss_is_a_finite_scalar_that_moves_every_parameter_it_should(self, name):
        method = tiny_method(name)
        for step in (0, 400):
            method.zero_grad()
            out = tiny_step(method, tiny_batch(method, seed=step), tiny_context(step))
            assert out.loss.shape == ()
            assert out.loss.dtype == torch.float32
            assert torch.isfinite(out.loss)
            out.loss.backward()
            for key, parameter in method.named_parameters():
                assert parameter.grad is not None, key
                assert torch.isfinite(parameter.grad).all(), key
            assert method.net.linear.weight.grad.abs().sum() > 0

    def test_the_parts_of_the_loss_are_logged_and_sum_to_it(self, name):
        method = tiny_method(name)
        out = tiny_step(method, tiny_batch(method), LATE)
        parts = [value for key, value in out.logs.items() if key.startswith("loss/")]
        assert parts
        torch.testing.assert_close(torch.stack(parts).sum(), out.loss.detach())

    def test_logs_are_detached_float32_scalars(self, name):
        method = tiny_method(name)
        for value in tiny_step(method, tiny_batch(method), LATE).logs.values():
            assert value.shape == ()
            assert value.dtype == torch.float32
            assert not value.requires_grad

    def test_predicts_the_reported_head(self, name):
        method = tiny_method(name).eval()
        with torch.autocast("cpu", torch.bfloat16):
            predictions = method.predict(torch.randn(7, 3, 4, 4))
        assert method.reported in predictions
        assert method.weights in ("averaged", "raw")
        for logits in predictions.values():
            assert logits.shape == (7, CLASSES)
            assert logits.dtype == torch.float32

    def test_its_figures_are_declared(self, name):
        method = tiny_method(name)
        declared = {figure.name for figure in method.figures}
        assert all(isinstance(figure, Figure) for figure in method.figures)
        assert all(figure.unit in ("share", "percent", "", "distribution") for figure in method.figures)
        logged = set(tiny_step(method, tiny_batch(method), LATE).logs) | set(method.statistics(6))
        assert {key for key in logged if not key.startswith("loss/")} <= declared

    def test_its_buffers_are_written_in_place(self, name):
        """The averaged network shares them."""
        method = tiny_method(name)
        before = {key: buffer.data_ptr() for key, buffer in method.named_buffers()}
        for step in range(3):
            tiny_step(method, tiny_batch(method, seed=step), LATE)
        assert {key: buffer.data_ptr() for key, buffer in method.named_buffers()} == before

    def test_a_restored_method_goes_on_to_the_bit(self, name):
        method, other = tiny_method(name), tiny_method(name)
        for step in range(3):
            tiny_step(method, tiny_batch(method, seed=step), LATE)
        other.load_state_dict(method.state_dict())
        batch = tiny_batch(method, seed=9)
        one, two = (
            tiny_step(m, batch, LATE._replace(generator=torch.Generator().manual_seed(1))) for m in (method, other)
        )
        assert torch.equal(one.loss, two.loss)
        assert all(torch.equal(value, two.logs[key]) for key, value in one.logs.items())
        assert all(torch.equal(value, other.state_dict()[key]) for key, value in method.state_dict().items())

    @pytest.mark.parametrize("amp", [False, True])
    def test_a_step_never_waits_for_the_device(self, name, amp):
        method = tiny_method(name)
        batch = tiny_batch(method)
        with SyncTrap(), torch.autocast("cpu", torch.bfloat16, enabled=amp):
            out = tiny_step(method, batch, LATE)
            out.loss.backward()

    def test_a_step_needs_no_value_on_the_host(self, name, monkeypatch):
        """On the meta device tensors have no values: whatever asks for one fails."""
        monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # does not know the device
        method = tiny_method(name).to("meta")
        batch = tiny_batch(method)
        ctx = LATE._replace(generator=torch.Generator())
        averaged = lambda images: images.new_zeros(len(images), FEATURES)  # noqa: E731
        out = tiny_step(method, to_device(batch, "meta"), ctx, averaged)
        out.loss.backward()
        assert out.loss.device.type == "meta"

    def test_statistics_stay_float32_under_autocast(self, name):
        method = tiny_method(name)
        with torch.autocast("cpu", torch.bfloat16):
            out = tiny_step(method, tiny_batch(method), LATE)
        assert out.loss.dtype == torch.float32
        for key, value in method.state_dict().items():
            assert value.dtype in {torch.float32, torch.int64}, key

    def test_evaluation_reads_only_parameters_and_the_networks_buffers(self, name):
        method = tiny_method(name).eval()
        x = torch.randn(7, 3, 4, 4)
        before = method.predict(x)
        saved = method.state_dict().keys()  # what is not saved follows from the data
        for key, value in method.named_buffers():
            if not key.startswith("net.") and key in saved:
                value.fill_(7)
        after = method.predict(x)
        assert all(torch.equal(after[head], logits) for head, logits in before.items())

    def test_an_unknown_option_is_named(self, name):
        with pytest.raises(UserError, match=rf"Unknown option of method '{name}' 'tauu'"):
            tiny_method(name, tauu=0.5)

    def test_every_option_has_a_default_that_passes_its_own_check(self, name):
        defaults = check_options(name, {})
        assert check_options(name, defaults) == defaults
        assert inspect.signature(method_class(name)).parameters.keys() - {"net", "info"} == defaults.keys()


def test_a_misspelled_method_is_named_with_the_nearest():
    with pytest.raises(UserError, match=r"Unknown method 'fixmach'\. Did you mean 'fixmatch'"):
        build_method("fixmach", TinyNet(), tiny_info())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau": 1.5}, r"method\.tau: .*less than or equal to 1, got 1\.5\. The default is 0\.7\."),
        ({"tau": "high"}, r"method\.tau: .*valid number, got 'high'"),
        ({"tau": float("nan")}, r"method\.tau: .*finite number, got nan"),
        ({"bank_size": 0}, r"method\.bank_size: .*greater than or equal to 1, got 0"),
        ({"bank_size": 1.5}, r"method\.bank_size: .*valid integer, got 1\.5"),
        ({"strong_views": True}, r"method\.strong_views: .*valid integer, got True"),
        ({"plce": 1}, r"method\.plce: .*valid boolean, got 1"),
        ({"bank": "lifo"}, r"method\.bank: .*'confidence' or 'fifo', got 'lifo'"),
        ({"warmup_epochs": 501}, r"method\.warmup_epochs: .*less than or equal to 500, got 501"),
    ],
)
def test_wrong_values_say_rule_value_and_default(options, message):
    with pytest.raises(UserError, match=message) as caught:
        check_options("semi", options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("self.reported = 'other'", r"reported must be one of \['standard'\], got 'other'"),
        ("self.reported, self.weights = 'standard', 'ema'", "weights must be averaged or raw, got 'ema'"),
        ("self.reported, self.streams = 'standard', {}", r"streams must hold one named labeled, got \[\]"),
    ],
)
def test_what_a_new_method_gets_wrong_is_said_at_once(tmp_path, monkeypatch, body, message):
    text = f"""
from semi_fast.methods.supervised import Supervised as Base


class Mine(Base):
    def __init__(self, net, info):
        super().__init__(net, info)
        {body}
"""
    (tmp_path / "mine.py").write_text(text)
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "semi_fast.methods.mine", raising=False)
    with pytest.raises(TypeError, match=f"Method 'mine': {message}"):
        build_method("mine", TinyNet(), tiny_info())


def test_an_integer_passes_for_a_float():
    assert check_options("semi", {"balance_strength": 1})["balance_strength"] == 1


def test_a_network_without_num_features_is_refused():
    with pytest.raises(TypeError, match="num_features"):
        build_method("supervised", nn.Flatten(), tiny_info())


def test_context_counts_epochs_without_rounding():
    steps = 7_000
    contexts = [Context.at(step, steps) for step in range(steps)]
    assert contexts[0] == (0, 0, 0.0, 0, None)
    assert contexts[-1].epoch == EPOCHS - 1
    assert next(c.step for c in contexts if c.epoch == 20) == 280
    assert all(0 <= c.progress < 1 for c in contexts)


def test_joint_forward_keeps_features_and_logits_of_an_image_together():
    """Every image carries its own number through the net; each part must hold the numbers it was given."""

    class FirstPixel(nn.Module):
        num_features = 1

        def forward(self, x):
            return x[:, 0, 0, :1]

    class Tenfold(nn.Module):
        def forward(self, features):
            return 10 * features

    method = tiny_method("semi", strong_views=3)
    batch = tiny_batch(method, labeled=4, unlabeled=5)
    batch.of("labeled", "weak")[:, 0, 0, 0] = torch.arange(4.0)
    batch.of("unlabeled", "weak")[:, 0, 0, 0] = 100 + torch.arange(5.0)
    for view, images in enumerate(batch.of("unlabeled", "strong").split(5), 2):
        images[:, 0, 0, 0] = 100 * view + torch.arange(5.0)
    heads = nn.ModuleDict({"ten": Tenfold(), "one": nn.Identity()})
    joint = forward_jointly(FirstPixel(), heads, batch)
    expected = {
        ("labeled", "weak"): list(range(4)),
        ("unlabeled", "weak"): list(range(100, 105)),
        ("unlabeled", "strong"): [*range(200, 205), *range(300, 305), *range(400, 405)],
    }
    for (stream, view), numbers in expected.items():
        rows = joint[stream][view]
        assert rows.features.flatten().tolist() == numbers
        assert rows.logits["ten"].flatten().tolist() == [10 * number for number in numbers]
        assert rows.logits["one"].flatten().tolist() == numbers


def test_batchnorm_sees_one_joint_batch():
    method = tiny_method("fixmatch", strong_views=2)
    joint = forward_jointly(method.net, method.heads, tiny_batch(method))
    features = torch.cat([rows.features for views in joint.values() for rows in views.values()])
    torch.testing.assert_close(features.mean(0), torch.zeros(FEATURES), atol=1e-5, rtol=0)


def test_heads_start_xavier_normal_with_zero_bias():
    net = nn.Module()
    net.num_features = 2000
    head = linear_head(net, 1000)
    assert (head.bias == 0).all()
    assert head.weight.std().item() == pytest.approx((2 / 3000) ** 0.5, rel=0.01)


def test_streams_have_one_weak_and_so_many_strong_views():
    assert two_streams(2)["unlabeled"].views == ("weak", "strong", "strong")
    assert tiny_method("fixmatch").streams == two_streams(1)
    assert tiny_method("semi").streams == two_streams(2)
    assert tiny_method("supervised").streams.keys() == {"labeled"}


def test_fixmatch_uses_one_pseudo_label_for_all_views_and_only_the_confident():
    method = tiny_method("fixmatch", strong_views=2, tau=0.45, unlabeled_weight=0.5)
    batch = tiny_batch(method)
    with torch.no_grad():
        unlabeled = forward_jointly(method.net, method.heads, batch)["unlabeled"]
    out = tiny_step(method, batch, LATE)
    p = unlabeled["weak"].logits["standard"].softmax(1)
    confidence, target = p.max(1)
    assert 0 < (confidence >= 0.45).sum() < len(p), "the batch must hold both"
    total = 0.0
    for v in range(2):
        for u in range(len(p)):
            if confidence[u] >= 0.45:
                row = unlabeled["strong"].logits["standard"][v * len(p) + u]
                total -= float(row.log_softmax(0)[target[u]])
    assert out.logs["loss/unlabeled"].item() == pytest.approx(0.5 * total / (2 * len(p)), rel=1e-5)
    assert out.logs["pseudo/used"].item() == pytest.approx(float((confidence >= 0.45).float().mean()))


LOG_PRIOR = torch.tensor([math.log(count / sum(COUNTS)) for count in COUNTS])


@pytest.mark.parametrize("name", ["supervised", "fixmatch"])
def test_logit_adjustment_in_training_changes_the_labeled_loss_alone(name):
    """Menon et al., Eq. 10: cross-entropy of z + tau log pi, written out row by row."""
    method = tiny_method(name, logit_adjustment="train", adjustment_strength=1.5)
    plain, batch = tiny_method(name), tiny_batch(method)
    with torch.no_grad():
        logits = forward_jointly(method.net, method.heads, batch)["labeled"]["weak"].logits["standard"]
    total = 0.0
    for row, label in zip(logits, batch.labels["labeled"], strict=True):
        scores = [float(z) + 1.5 * float(log) for z, log in zip(row, LOG_PRIOR, strict=True)]
        total += math.log(sum(math.exp(score) for score in scores)) - scores[label]
    adjusted, unadjusted = tiny_step(method, batch, LATE).logs, tiny_step(plain, batch, LATE).logs
    assert adjusted["loss/labeled"].item() == pytest.approx(total / len(logits), rel=1e-5)
    assert adjusted["loss/labeled"] != unadjusted["loss/labeled"]
    assert all(torch.equal(adjusted[key], unadjusted[key]) for key in adjusted if key != "loss/labeled")
    assert method.reported == "standard"
    x = torch.randn(3, 3, 4, 4)
    assert torch.equal(method.eval().predict(x)["standard"], method.heads["standard"](method.net(x)))


@pytest.mark.parametrize("name", ["supervised", "fixmatch"])
def test_logit_adjustment_post_hoc_changes_the_prediction_alone(name):
    method, plain = tiny_method(name, logit_adjustment="posthoc"), tiny_method(name)
    batch = tiny_batch(method)
    assert torch.equal(tiny_step(method, batch, LATE).loss, tiny_step(plain, batch, LATE).loss)
    predictions = method.eval().predict(batch.images)
    assert list(predictions) == ["adjusted", "standard"]
    assert method.reported == "adjusted"
    torch.testing.assert_close(predictions["adjusted"], predictions["standard"] - LOG_PRIOR)


def test_logit_adjustment_of_pseudo_labels_is_seval_s_fixmatch_la():
    method = tiny_method("fixmatch", logit_adjustment="pseudo", tau=0.45)
    batch = tiny_batch(method)
    with torch.no_grad():
        unlabeled = forward_jointly(method.net, method.heads, batch)["unlabeled"]
    p = (unlabeled["weak"].logits["standard"] - LOG_PRIOR).softmax(1)
    out = tiny_step(method, batch, LATE)
    assert torch.equal(out.pseudo.target, p.argmax(1))
    assert not torch.equal(out.pseudo.target, unlabeled["weak"].logits["standard"].argmax(1)), "it must matter"
    torch.testing.assert_close(out.pseudo.confidence, p.amax(1))
    plain = tiny_step(tiny_method("fixmatch", tau=0.45), batch, LATE)
    assert torch.equal(out.logs["loss/labeled"], plain.logs["loss/labeled"])


def test_supervised_learning_has_no_pseudo_labels_to_adjust():
    with pytest.raises(UserError, match=r"method\.logit_adjustment: .*'off', 'train' or 'posthoc', got 'pseudo'"):
        tiny_method("supervised", logit_adjustment="pseudo")


@pytest.mark.parametrize(
    "waits",
    [
        lambda x: x.sum().item(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: bool((x > 0).any()),
        lambda x: x.masked_select(x > 0),
        lambda x: (x > 0).long().bincount(),
        lambda x: x.to("meta"),
        lambda x: x.index_put_((x > 0,), torch.tensor(0.0)),
    ],
)
def test_the_trap_catches_what_waits(waits):
    with pytest.raises(AssertionError, match=r"waits|depends on data|copies"), SyncTrap():
        waits(torch.tensor([1.0, -1.0]))
