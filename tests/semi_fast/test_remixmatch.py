"""ReMixMatch: targets, the mixed batch, turned images, the four losses, and several processes."""

import pytest
import torch

from semi_fast.methods import remixmatch
from semi_fast.methods.remixmatch import turn
from semi_fast.parts.alignment import sharpen
from semi_fast.parts.forward import forward_jointly
from semi_fast.processes import gather
from tests.semi_fast.shared_steps import assert_two_processes_keep_the_state_of_one
from tests.semi_fast.tiny import CLASSES, COUNTS, tiny_batch, tiny_context, tiny_method, tiny_prepared, tiny_step


def soft_ce(logits, target):
    return -sum(float(t) * float(p) for t, p in zip(target, logits.double().log_softmax(0), strict=True))


def test_sharpening_raises_to_a_power():
    assert sharpen(torch.tensor([[0.5, 0.3, 0.2]]), 2.0)[0].tolist() == pytest.approx([25 / 38, 9 / 38, 4 / 38])


def test_each_image_is_turned_by_its_own_quarters():
    images = torch.randn(8, 3, 4, 4)
    angles = torch.tensor([0, 1, 2, 3, 3, 2, 1, 0])
    turned = turn(images, angles)
    for i, quarters in enumerate(angles.tolist()):
        for row in range(4):
            for column in range(4):
                r, c = row, column
                for _ in range(quarters):  # counter-clockwise: what is at the right comes to the top
                    r, c = c, 3 - r
                assert torch.equal(turned[i, :, row, column], images[i, :, r, c])


def test_the_mixed_batch_is_a_plain_loop():
    method = tiny_method("remixmatch")
    batch = tiny_batch(method)
    drawn = method.inputs(batch, tiny_context(3))
    share, partners = float(drawn.mixing.share), drawn.mixing.partners.tolist()
    everything = [batch.of("labeled", "weak"), batch.of("unlabeled", "weak"), batch.of("unlabeled", "strong")]
    images = [image for part in everything for image in part]
    assert len(images) == 6 + 10 + 20
    seen, _ = tiny_prepared(method, batch, tiny_context(3))
    mixed = seen.of("all", "mixed")
    assert len(mixed) == len(images)
    for i, partner in enumerate(partners):
        torch.testing.assert_close(mixed[i], share * images[i] + (1 - share) * images[partner])
    assert torch.equal(seen.of("unlabeled", "weak"), everything[1])
    assert torch.equal(seen.of("unlabeled", "strong"), everything[2][:10])
    assert torch.equal(seen.of("unlabeled", "turned"), turn(everything[2][:10], drawn.angles))
    large = seen._replace(images=batch.images.to(memory_format=torch.channels_last))
    large, _ = method.prepare(batch._replace(images=large.images), drawn, None)
    assert large.images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("alignment", [True, False])
def test_the_losses_are_the_slow_versions(alignment):
    method = tiny_method("remixmatch", alignment=alignment, window=2, ramp=0.01)
    pi, means = [count / sum(COUNTS) for count in COUNTS], [[1 / CLASSES] * CLASSES] * 2
    for step in (1, 2, 3):
        batch, ctx = tiny_batch(method, seed=step), tiny_context(step, steps=500)
        drawn = method.inputs(batch, tiny_context(step))
        seen, _ = tiny_prepared(method, batch, tiny_context(step))
        with torch.no_grad():
            joint = forward_jointly(method.net, method.heads, seen)
            angles = method.rotation(joint["unlabeled"]["turned"].features)
        p = joint["unlabeled"]["weak"].logits["standard"].softmax(1).tolist()
        targets = []
        for row in p:
            if alignment:
                mean = [(a + b) / 2 for a, b in zip(*means[-2:], strict=True)]
                row = [x * (t + 1e-6) / (m + 1e-6) for x, t, m in zip(row, pi, mean, strict=True)]
            square = [(x / sum(row)) ** 2 for x in row]
            targets.append([x / sum(square) for x in square])
        means.append([sum(column) / 10 for column in zip(*p, strict=True)])
        labels = [[float(k == y) for k in range(CLASSES)] for y in batch.labels["labeled"].tolist()]
        every, share = labels + 3 * targets, float(drawn.mixing.share)
        mixed = [
            [share * a + (1 - share) * b for a, b in zip(every[i], every[j], strict=True)]
            for i, j in enumerate(drawn.mixing.partners.tolist())
        ]
        z, ramp = joint["all"]["mixed"].logits["standard"], min(1.0, step / 500 / 0.01)
        rows = [soft_ce(z[i], mixed[i]) for i in range(36)]
        anchors = joint["unlabeled"]["strong"].logits["standard"]
        expected = {
            "labeled": sum(rows[:6]) / 6,
            "unlabeled": 1.5 * ramp * sum(rows[6:]) / 30,
            "anchor": 0.5 * ramp * sum(soft_ce(anchors[i], targets[i]) for i in range(10)) / 10,
            "rotation": 0.5
            * sum(-float(angles[i].log_softmax(0)[quarters]) for i, quarters in enumerate(drawn.angles.tolist()))
            / 10,
        }
        out = tiny_step(method, batch, ctx)
        for name, value in expected.items():
            assert out.logs[f"loss/{name}"].item() == pytest.approx(value, rel=1e-4), name
        assert out.pseudo.mask.all()
        assert out.pseudo.target.tolist() == [row.index(max(row)) for row in targets]
    assert 0 < min(1.0, 1 / 500 / 0.01) < 1, "the ramp must matter"


def test_targets_take_no_gradient():
    method = tiny_method("remixmatch")
    batch, prepared = tiny_prepared(method, tiny_batch(method), tiny_context(400))
    joint = forward_jointly(method.net, method.heads, batch)
    logits = joint["unlabeled"]["weak"].logits["standard"]
    logits.retain_grad()
    method.objective(joint, batch.labels, batch.rows, prepared).loss.backward()
    assert logits.grad is None or not logits.grad.any()


def test_labeled_images_may_be_strong():
    method = tiny_method("remixmatch", labeled_view="strong")
    assert method.streams["labeled"].views == ("strong",)
    assert torch.isfinite(tiny_step(method, tiny_batch(method), tiny_context(9)).loss)


def test_two_processes_turn_what_one_turns(monkeypatch):
    method = tiny_method("remixmatch")
    alone = method.inputs(tiny_batch(method, labeled=6, unlabeled=10), tiny_context(7))
    shares = []
    for rank in range(2):
        with monkeypatch.context() as patch:
            for module in (remixmatch, gather):
                patch.setattr(module, "world_size", lambda: 2)
            patch.setattr(gather.dist, "get_rank", lambda rank=rank: rank)
            shares.append(method.inputs(tiny_batch(method, labeled=3, unlabeled=5), tiny_context(7)))
    assert torch.equal(torch.cat([share.angles for share in shares]), alone.angles)
    assert all(torch.equal(share.mixing.share, alone.mixing.share) for share in shares)


def test_two_processes_keep_the_state_of_one(tmp_path):
    state = assert_two_processes_keep_the_state_of_one(tmp_path, "remixmatch", window=4)
    assert not torch.equal(state["mean.recent"][-1], state["mean.recent"][0])
