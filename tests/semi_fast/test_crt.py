"""cRT: class weights, mixed images and targets, what is frozen, and runs killed at the change of its stages."""

import pytest
import torch

from data_prep.errors import UserError
from semi_fast.methods import build_method
from semi_fast.parts.forward import forward_jointly
from semi_fast.parts.mixup import draw_mixing, mix
from semi_fast.run.checkpoint import load_checkpoint
from semi_fast.run.run import Run
from tests.semi_fast.outcome import assert_same, outcome
from tests.semi_fast.tiny import (
    CLASSES,
    COUNTS,
    TinyNet,
    tiny_batch,
    tiny_context,
    tiny_info,
    tiny_method,
    tiny_prepared,
    tiny_step,
)
from tests.semi_fast.trained_runs import train

RETRAIN = 1  # stage


def test_mixing_is_at_least_half_and_of_all_rows():
    mixings = [draw_mixing(9, 0.75, torch.Generator().manual_seed(step), torch.device("cpu")) for step in range(200)]
    shares = torch.stack([mixing.share for mixing in mixings])
    assert (shares >= 0.5).all()
    assert (shares <= 1).all()
    # E max(l, 1 - l) of Beta(0.75, 0.75), by a sum over its density.
    x = torch.arange(0.5, 1e5) / 1e5
    density = (x * (1 - x)) ** -0.25
    expected = float((torch.maximum(x, 1 - x) * density).sum() / density.sum())
    assert shares.mean().item() == pytest.approx(expected, abs=4 * float(shares.std()) / 200**0.5)
    assert all(sorted(mixing.partners.tolist()) == list(range(9)) for mixing in mixings)
    assert len({tuple(mixing.partners.tolist()) for mixing in mixings}) > 190
    again = draw_mixing(9, 0.75, torch.Generator().manual_seed(3), torch.device("cpu"))
    assert torch.equal(again.share, mixings[3].share)
    assert torch.equal(again.partners, mixings[3].partners)
    images = torch.randn(9, 3, 4, 4).to(memory_format=torch.channels_last)
    mixed = mix(images, again)
    share = float(again.share)
    for i in range(9):
        torch.testing.assert_close(mixed[i], share * images[i] + (1 - share) * images[int(again.partners[i])])
    assert mixed.is_contiguous(memory_format=torch.channels_last)
    assert mix(images.bfloat16(), again).dtype == torch.bfloat16


def test_the_loss_of_mixed_images_is_the_slow_version():
    method = tiny_method("crt")
    batch = tiny_batch(method)
    mixing = method.inputs(batch, tiny_context(4, stage=RETRAIN)).mixing
    share, partners = float(mixing.share), mixing.partners.tolist()
    images = [share * batch.images[i] + (1 - share) * batch.images[partners[i]] for i in range(6)]
    seen, _ = tiny_prepared(method, batch, tiny_context(4, stage=RETRAIN))
    torch.testing.assert_close(seen.images, torch.stack(images))
    with torch.no_grad():
        z = forward_jointly(method.net, method.heads, seen)["labeled"]["strong"].logits["retrained"]
    inverse = [1 / count for count in COUNTS]
    weights = [CLASSES * x / sum(inverse) for x in inverse]
    labels, total = batch.labels["labeled"].tolist(), 0.0
    for i in range(6):
        target = [share * (k == labels[i]) + (1 - share) * (k == labels[partners[i]]) for k in range(CLASSES)]
        total -= sum(w * y * float(p) for w, y, p in zip(weights, target, z[i].log_softmax(0), strict=True))
    out = tiny_step(method, batch, tiny_context(4, stage=RETRAIN))
    assert out.loss.item() == pytest.approx(total / 6, rel=1e-5)
    assert len({*labels}) > 1


def test_the_other_form_is_the_samplers_loss_in_expectation():
    """Drawing images with weights 1 / E_k, and uniform classes weighted by N_k / E_k."""
    method = tiny_method("crt", form="daso", effective=0.9)
    losses = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])  # of the images of each class
    effective = [(1 - 0.9**count) / (1 - 0.9) for count in COUNTS]
    drawn = [count / e for count, e in zip(COUNTS, effective, strict=True)]
    expected = sum(p / sum(drawn) * float(x) for p, x in zip(drawn, losses, strict=True))
    assert float((method.class_weights * losses).mean()) == pytest.approx(expected, rel=1e-5)
    assert method.streams["labeled"].balanced
    batch = tiny_batch(method)
    assert method.inputs(batch, tiny_context(0, stage=RETRAIN)).mixing is None
    with torch.no_grad():
        z = forward_jointly(method.net, method.heads, batch)["labeled"]["weak"].logits["retrained"]
    rows = [
        -float(method.class_weights[y] * p.log_softmax(0)[y]) for p, y in zip(z, batch.labels["labeled"], strict=True)
    ]
    assert tiny_step(method, batch, tiny_context(0, stage=RETRAIN)).loss.item() == pytest.approx(
        sum(rows) / 6, rel=1e-5
    )


def test_the_first_stage_is_supervised_and_may_be_left_out():
    method = tiny_method("crt", learn_share=0.9)
    assert method.starts() == (0.0, 0.9)
    batch = tiny_batch(method)
    with torch.no_grad():
        z = forward_jointly(method.net, method.heads, batch)["labeled"]["strong"].logits["standard"]
    rows = [-float(p.log_softmax(0)[y]) for p, y in zip(z, batch.labels["labeled"], strict=True)]
    assert tiny_step(method, batch, tiny_context(0)).loss.item() == pytest.approx(sum(rows) / 6, rel=1e-5)
    alone = tiny_method("crt", learn_share=0.0)
    assert alone.starts() == (0.0,)
    assert {group.prefix for group in alone.groups(0)} == {"net", "heads.standard"}
    assert alone.inputs(batch, tiny_context(0)) is not None


@pytest.mark.parametrize("name", ["crt", "cossl"])
def test_a_class_without_labels_is_refused(name):
    info = tiny_info()._replace(labeled_counts=(8, 4, 0, 2, 0))
    with pytest.raises(UserError, match=rf"method={name} needs a labeled image of every class, got none of c, e\."):
        build_method(name, TinyNet(), info)


class KilledError(Exception):
    pass


@pytest.mark.usefixtures("fresh_accelerator")
def test_frozen_parts_do_not_move_by_a_bit_and_killed_runs_go_on_to_the_bit(digits, tmp_path, monkeypatch):
    options = ["save_every=1", "keep=9", "ema.buffers=averaged"]
    whole = train(tmp_path / "whole", digits, *options, method="crt", steps=6)
    saved = {n: load_checkpoint(whole / f"checkpoints/step-{n:09d}").tensors for n in (1, 3, 6)}
    for group in ("model", "ema"):
        for name, value in saved[6][group].items():
            if name.endswith("num_batches_tracked"):  # is not counted
                continue
            head = name.startswith("heads.retrained")
            assert torch.equal(saved[3][group][name], value) != head, name
            assert head == torch.equal(saved[1][group][name], saved[3][group][name]), name
    assert saved[6]["model"].keys() > {"net.bn.running_mean", "net.bn.running_var"}

    tick = Run.tick
    for step in (2, 3, 4):

        def dies(self, now, step=step):
            tick(self, now)
            if now == step:
                raise KilledError

        with monkeypatch.context() as patch:
            patch.setattr(Run, "tick", dies)
            with pytest.raises(KilledError):
                train(tmp_path / "parts", digits, *options, method="crt", steps=6)
    assert_same(outcome(train(tmp_path / "parts", digits, *options, method="crt", steps=6)), outcome(whole))


@pytest.mark.usefixtures("fresh_accelerator")
def test_a_head_is_trained_anew_on_a_run_of_darp(digits, tmp_path):
    with pytest.raises(UserError, match=r"got one that never trained\. Name a run by start_from"):
        train(tmp_path / "nothing", digits, "method.learn_share=0.0", method="crt")
    first = train(tmp_path / "first", digits, "method.warmup_epochs=0", method="darp")
    run = train(tmp_path / "run", digits, "method.learn_share=0.0", f"start_from={first}", method="crt")
    start = load_checkpoint(first / "checkpoints/step-000000006").tensors
    last = load_checkpoint(run / "checkpoints/step-000000006").tensors["model"]
    averaged = {**{k: x for k, x in start["model"].items() if k.startswith("net.")}, **start["ema"]}
    for name, value in averaged.items():
        assert torch.equal(last[name], value), name
    assert not torch.equal(last["heads.retrained.weight"], last["heads.standard.weight"])
