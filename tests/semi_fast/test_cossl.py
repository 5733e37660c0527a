"""CoSSL: stages, features enhanced beforehand and within a step, both losses, and runs killed at its stage changes."""

import math

import numpy as np
import pytest
import torch

from data_prep.errors import UserError
from semi_fast.methods import cossl
from semi_fast.parts.enhancement import blending_chance, enhance
from semi_fast.parts.forward import forward_jointly
from semi_fast.processes import gather
from semi_fast.run.checkpoint import load_checkpoint
from semi_fast.run.run import Run
from semi_fast.training.look import RunLook
from tests.semi_fast.outcome import assert_same, outcome
from tests.semi_fast.tiny import (
    CLASSES,
    COUNTS,
    tiny_averaged,
    tiny_batch,
    tiny_context,
    tiny_method,
    tiny_prepared,
    tiny_step,
)
from tests.semi_fast.trained_runs import train

LONG_TAIL = torch.tensor([500, 299, 179, 107, 64, 38, 23, 13, 8, 5])
WARMUP, JOINT = 1, 2  # stages


def ce(logits, target):
    return -float(logits.double().log_softmax(0)[target])


def test_chances_are_the_vector_of_the_specification():
    expected = [0, 0.402, 0.642, 0.786, 0.872, 0.924, 0.954, 0.974, 0.984, 0.99]
    assert blending_chance(LONG_TAIL).tolist() == pytest.approx(expected)


def test_stages_have_the_published_lengths():
    assert tiny_method("cossl").starts() == pytest.approx((0, 400 / 510, 410 / 510))
    assert tiny_method("cossl", feature_epochs=0).starts() == pytest.approx((0, 10 / 110))


def test_features_enhanced_beforehand_are_the_slow_versions():
    generator = torch.Generator().manual_seed(0)
    counts, K, d = (6, 3, 1), 3, 4
    labels = torch.tensor([0] * 6 + [1] * 3 + [2])[torch.randperm(10, generator=generator)]
    labeled, unlabeled = (torch.randn(n, d, generator=generator) for n in (10, 3))
    random, expected = np.random.default_rng(7), []
    head = []
    for k in range(K):
        mean = sum(labeled[i] for i in range(10) if labels[i] == k) / counts[k]
        head.append(mean / math.sqrt(float((mean**2).sum())))

    def probability(feature, k):
        scores = [math.exp(float(feature @ row)) for row in head]
        return scores[k] / sum(scores)

    for k in range(K):
        own = [labeled[i] for i in range(10) if labels[i] == k]
        others = [labeled[i] for i in range(10) if labels[i] != k] + list(unlabeled)
        others.sort(key=lambda feature, k=k: -probability(feature, k))
        drawn, shares = random.integers(len(own), size=6 - len(own)), random.beta(0.75, 0.75, (6 - len(own), 1))
        rows = list(own)
        for j, (i, share) in enumerate(zip(drawn, shares, strict=True)):
            rows.append(float(share[0]) * own[i] + (1 - float(share[0])) * others[j % len(others)])
        expected.append(torch.stack(rows))
    torch.testing.assert_close(enhance(labeled, labels, unlabeled, 7), torch.stack(expected))


def test_too_few_other_features_begin_anew():
    labeled = torch.eye(4)
    made = enhance(labeled, torch.tensor([0, 0, 0, 1]), torch.zeros(0, 4), 0)
    assert made.shape == (2, 3, 4)
    assert torch.isfinite(made).all()


@pytest.mark.parametrize("stage", [WARMUP, JOINT])
def test_features_are_blended_within_a_step_as_the_slow_version_does(stage):
    method = tiny_method("cossl", enhancement="online")
    batch = tiny_batch(method, labeled=40)
    inputs = method.inputs(batch, tiny_context(3, stage=stage))
    draws = inputs.warmup or inputs.joint
    assert (draws.share >= 0.6).all()
    assert (draws.share <= 1).all()
    first, second = (tiny_averaged(batch.of(stream, "strong")) for stream in ("balanced", "any"))
    expected, count = [], 0
    for i, y in enumerate(batch.labels["balanced"].tolist()):
        share = float(draws.share[i]) if draws.chance[i] < (8 - COUNTS[y]) / 8 else 1.0
        count += share < 1
        expected.append(share * first[i] + (1 - share) * second[i])
    _, prepared = tiny_prepared(method, batch, tiny_context(3, stage=stage))
    torch.testing.assert_close(prepared.features, torch.stack(expected))
    assert torch.equal(prepared.targets, batch.labels["balanced"])
    assert 0 < count < 40
    assert int(prepared.enhanced.sum()) == count
    out = tiny_step(method, batch, tiny_context(3, stage=stage))
    logits = method.heads["teacher"](prepared.features).detach()
    losses = [ce(z, int(y)) for z, y in zip(logits, prepared.targets, strict=True)]
    assert out.logs["loss/head"].item() == pytest.approx(sum(losses) / 40, rel=1e-5)
    assert out.logs["cossl/enhanced"].item() == pytest.approx(count / 40)


def test_what_was_enhanced_beforehand_is_drawn_class_by_class():
    method = tiny_method("cossl")
    method.enhanced.copy_(torch.arange(CLASSES * 8.0).view(CLASSES, 8, 1).expand_as(method.enhanced))
    batch = tiny_batch(method, labeled=400)
    _, prepared = tiny_prepared(method, batch, tiny_context(5, stage=WARMUP))
    number = prepared.features[:, 0].long()
    assert torch.equal(prepared.targets, number // 8)
    assert prepared.enhanced.tolist() == [n % 8 >= COUNTS[n // 8] for n in number.tolist()]
    assert torch.bincount(prepared.targets, minlength=CLASSES).min() > 400 / CLASSES / 2


def test_the_warm_up_runs_no_network_and_asks_for_no_average_of_what_it_has(monkeypatch):
    method = tiny_method("cossl")
    monkeypatch.setattr(method.net, "forward", None)
    out = tiny_step(method, tiny_batch(method), tiny_context(0, stage=WARMUP), averaged=None)
    out.loss.backward()
    trained = {name for name, parameter in method.named_parameters() if parameter.grad is not None}
    assert trained == {"heads.teacher.weight", "heads.teacher.bias"}
    assert out.pseudo is None


def test_the_first_stage_is_fixmatch():
    method, fixmatch = (tiny_method(name, tau=0.45, strong_views=2) for name in ("cossl", "fixmatch"))
    fixmatch.load_state_dict({k: x for k, x in method.state_dict().items() if k in fixmatch.state_dict()})
    batch = tiny_batch(method)
    expected = tiny_step(fixmatch, batch.only(*((g.stream, g.view) for g in batch.groups[:3])), tiny_context(0))
    assert torch.equal(tiny_step(method, batch, tiny_context(0)).loss, expected.loss)


def test_the_joint_stage_learns_from_the_teachers_labels_without_a_gradient_between_both():
    method = tiny_method("cossl", tau=0.5, strong_views=2)
    batch = tiny_batch(method)
    small, prepared = tiny_prepared(method, batch, tiny_context(3, stage=JOINT))
    assert [(group.stream, group.view) for group in small.groups] == [("labeled", "weak"), ("unlabeled", "strong")]
    torch.testing.assert_close(prepared.weak, tiny_averaged(batch.of("unlabeled", "weak")))
    with torch.no_grad():
        joint = forward_jointly(method.net, method.heads, small)
        p = method.heads["teacher"](prepared.weak).softmax(1)
    confidence, target = p.max(1)
    assert 0 < (confidence >= 0.5).sum() < 10
    strong, total = joint["unlabeled"]["strong"].logits["standard"], 0.0
    for v in range(2):
        for u in range(10):
            if confidence[u] >= 0.5:
                total += ce(strong[10 * v + u], int(target[u]))
    out = tiny_step(method, batch, tiny_context(3, stage=JOINT))
    assert out.logs["loss/unlabeled"].item() == pytest.approx(total / 20, rel=1e-5)
    labeled = joint["labeled"]["weak"].logits["standard"]
    expected = sum(ce(z, int(y)) for z, y in zip(labeled, batch.labels["labeled"], strict=True)) / 6
    assert out.logs["loss/labeled"].item() == pytest.approx(expected, rel=1e-5)

    out.loss.backward()
    head = {key: x.grad.clone() for key, x in method.heads["teacher"].named_parameters()}
    teacher = torch.nn.Linear(8, CLASSES)
    teacher.load_state_dict(method.heads["teacher"].state_dict())
    loss = torch.nn.functional.cross_entropy(teacher(prepared.features), prepared.targets)
    loss.backward()
    torch.testing.assert_close(head["bias"], teacher.bias.grad)
    torch.testing.assert_close(head["weight"], teacher.weight.grad)


def test_two_processes_draw_what_one_draws(monkeypatch):
    method = tiny_method("cossl")
    for stage in (WARMUP, JOINT):
        alone = method.inputs(tiny_batch(method, labeled=6), tiny_context(7, stage=stage))
        shares = []
        for rank in range(2):
            with monkeypatch.context() as patch:
                for module in (cossl, gather):
                    patch.setattr(module, "world_size", lambda: 2)
                patch.setattr(gather.dist, "get_rank", lambda rank=rank: rank)
                shares.append(method.inputs(tiny_batch(method, labeled=3), tiny_context(7, stage=stage)))
        one, *both = ((x.warmup or x.joint) for x in (alone, *shares))
        for name, whole in one._asdict().items():
            if whole is not None:
                assert torch.equal(torch.cat([getattr(share, name) for share in both]), whole), name
        assert (one.picked is None) == (stage == JOINT)


class KilledError(Exception):
    pass


@pytest.mark.usefixtures("fresh_accelerator")
class TestRuns:
    OPTIONS = (
        *("method.feature_epochs=3", "method.warmup_epochs=3", "method.joint_epochs=3", "method.tau=0.2"),
        *("save_every=1", "keep=9", "ema.buffers=averaged"),
    )

    def run(self, folder, digits, *more):
        return train(folder, digits, *self.OPTIONS, *more, method="cossl", steps=9)

    def test_frozen_parts_and_their_averages_do_not_move_by_a_bit_and_killed_runs_go_on_to_the_bit(
        self, digits, tmp_path, monkeypatch
    ):
        whole = self.run(tmp_path / "whole", digits)
        saved = {n: load_checkpoint(whole / f"checkpoints/step-{n:09d}").tensors for n in range(1, 10)}

        def part(name):
            return ".".join(name.split(".")[: 2 if name.startswith("heads") else 1])

        def moved(one, two):
            """Parts of which something differs between two checkpoints, in the weights and in the averages."""
            before, after = saved[one], saved[two]
            return [
                {part(name) for name, value in after[group].items() if not torch.equal(value, before[group][name])}
                for group in ("model", "ema")
            ]

        assert moved(1, 3) == [{"net", "heads.standard"}] * 2
        assert moved(3, 6) == [{"enhanced", "heads.teacher"}, {"heads.teacher"}]
        assert moved(6, 9) == [{"net", "heads.standard", "heads.teacher"}] * 2

        tick = Run.tick

        def dies_at(step):
            def dies(self, now):
                tick(self, now)
                if now == step:
                    raise KilledError

            return Run, "tick", dies

        def dies_within(self, rows):
            raise KilledError

        for patched in (dies_at(3), (RunLook, "features", dies_within), dies_at(4), dies_at(6)):
            with monkeypatch.context() as patch:
                patch.setattr(*patched)
                with pytest.raises(KilledError):
                    self.run(tmp_path / "parts", digits)
        assert_same(outcome(self.run(tmp_path / "parts", digits)), outcome(whole))

    def test_it_starts_from_a_run_of_fixmatch(self, digits, tmp_path):
        with pytest.raises(UserError, match=r"got one that never trained\. Name a run by start_from"):
            self.run(tmp_path / "nothing", digits, "method.feature_epochs=0")
        first = train(tmp_path / "first", digits, method="fixmatch")
        run = self.run(tmp_path / "run", digits, "method.feature_epochs=0", f"start_from={first}")
        start = load_checkpoint(first / "checkpoints/step-000000006").tensors
        warm = load_checkpoint(run / "checkpoints/step-000000004").tensors
        for name, value in start["ema"].items():
            assert torch.equal(warm["ema"][name], value), name
            assert torch.equal(warm["model"][name], value), name
        labels = torch.from_numpy(np.load(digits / "train_labels.npy")[np.load(digits / "labeled_rows.npy")])
        most = int(torch.bincount(labels).max())
        assert warm["model"]["enhanced"].shape[:2] == (10, most)
        assert warm["model"]["enhanced"].abs().sum(2).gt(0).all()
