"""SeMi's options for short runs: a stage of labeled images, an averaged teacher, one set of pseudo-labels for all."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

from data_prep.errors import UserError
from semi_fast.methods.base import compile_parts
from semi_fast.parts.forward import forward_jointly
from semi_fast.parts.groups import ParamGroup
from tests.semi_fast.recorded import FxRecorder
from tests.semi_fast.test_graph import assert_same, make_trainer, run
from tests.semi_fast.tiny import CLASSES, COUNTS, tiny_batch, tiny_context, tiny_method, tiny_prepared, tiny_step

TAU = 0.5
LATE = tiny_context(400)
SHORT = {"labeled_share": 0.5, "joint_rate": 0.2, "teacher": "averaged", "pseudo_labels": "balanced"}
PRIOR = torch.tensor(COUNTS) / sum(COUNTS)


def semi(**options):
    return tiny_method("semi", **{"tau": TAU, "prior": "labeled", **options})


def mean_ce(logits, labels):
    return -sum(float(z.detach().log_softmax(0)[y]) for z, y in zip(logits, labels, strict=True)) / len(labels)


def averaged_by(method):
    """The averaged network as the loop gives it, of a method that stays as it is."""
    frozen = copy.deepcopy(method).eval()

    def averaged(images, of=None):
        with torch.no_grad():
            return (frozen.net(images) if of is None else of(frozen, images)).float()

    return frozen, averaged


@pytest.mark.parametrize("strength", [None, 1.0])
def test_the_first_stage_learns_from_labeled_images_alone(strength):
    method = semi(labeled_share=0.3, labeled_strength=strength)
    assert method.starts() == (0.0, 0.3)
    batch = tiny_batch(method)
    seen, _ = tiny_prepared(method, batch, tiny_context(7))
    assert [(group.stream, group.view) for group in seen.groups] == [("labeled", "weak")]
    assert torch.equal(seen.images, batch.of("labeled", "weak"))
    with torch.no_grad():
        logits = forward_jointly(method.net, method.heads, seen)["labeled"]["weak"].logits
    labels = batch.labels["labeled"]
    before = {key: value.clone() for key, value in method.state_dict().items() if not key.startswith("net.")}
    out = tiny_step(method, batch, tiny_context(7))
    assert out.logs.keys() == {"loss/labeled", "loss/balanced_labeled"}
    assert out.logs["loss/labeled"].item() == pytest.approx(mean_ce(logits["standard"], labels), rel=1e-5)
    adjusted = logits["balanced"] + (2.0 if strength is None else strength) * PRIOR.log()
    assert out.logs["loss/balanced_labeled"].item() == pytest.approx(mean_ce(adjusted, labels), rel=1e-5)
    assert out.loss.item() == pytest.approx(sum(float(value) for value in out.logs.values()))
    assert out.pseudo is None
    assert all(torch.equal(method.state_dict()[key], value) for key, value in before.items()), "nothing else moves"


def test_the_second_stage_is_the_method_at_its_own_rate():
    method, plain = semi(labeled_share=0.3, joint_rate=0.2), semi()
    assert method.groups(0) == ()
    assert method.groups(1) == (ParamGroup("", 0.2),)
    assert [method.idle(stage) for stage in (0, 1)] == [("unlabeled",), ()]
    assert plain.starts() == (0.0,)
    assert plain.groups(0) == plain.idle(0) == ()
    for step in (5, 400):  # within its warm-up and behind it
        batch = tiny_batch(plain, seed=step)
        out, expected = (
            tiny_step(method, batch, tiny_context(step, stage=1)),
            tiny_step(plain, batch, tiny_context(step)),
        )
        assert torch.equal(out.loss, expected.loss)


def test_the_averaged_teacher_sees_the_weak_views_and_the_network_does_not():
    method = semi(teacher="averaged")
    frozen, averaged = averaged_by(semi())
    with torch.no_grad():
        for parameter in frozen.parameters():
            parameter.add_(0.1)
    batch = tiny_batch(method, seed=3)
    seen, given = method.prepare(batch, method.inputs(batch, LATE), averaged)
    assert [(group.stream, group.view) for group in seen.groups] == [("labeled", "weak"), ("unlabeled", "strong")]
    with torch.no_grad():
        features = frozen.net(batch.of("unlabeled", "weak"))
        assert torch.equal(given.weak.features, features)
        assert list(given.weak.logits) == list(method.heads)
        for name, head in frozen.heads.items():
            torch.testing.assert_close(given.weak.logits[name], head(features))
    out = method(batch, method.inputs(batch, LATE), averaged)
    target = given.weak.logits["standard"].softmax(1)
    assert torch.equal(out.pseudo.target, target.argmax(1))
    assert torch.equal(out.pseudo.mask, target.amax(1) >= TAU)


def test_pseudo_labels_of_the_balanced_head_are_those_of_all():
    """L_U against t^b where M^b is on, weighted by hardness; L_EA elsewhere; the bank and m~ take them in."""
    method = semi(pseudo_labels="balanced", warmup_epochs=0, plce=True)
    batch = tiny_batch(method, seed=7)
    with torch.no_grad():
        joint = forward_jointly(method.net, method.heads, batch)
    weak, strong = joint["unlabeled"]["weak"], joint["unlabeled"]["strong"]
    q = weak.logits["standard"].softmax(1)  # q' = q while the bank is empty
    adjusted = (weak.logits["standard"] - 2 * PRIOR.log()).softmax(1)
    mask = (adjusted.amax(1) >= TAU) | (weak.logits["balanced"].softmax(1).amax(1) >= TAU)
    assert not torch.equal(adjusted.argmax(1), q.argmax(1)), "the two heads must differ here"
    hardness = 0.25 + 0.75 * torch.special.entr(q).sum(1) / torch.log(torch.tensor(CLASSES))
    total, rows = 0.0, len(q)
    for v in range(2):
        for u in range(rows):
            log_p = strong.logits["standard"][v * rows + u].log_softmax(0)
            total -= float(mask[u] * hardness[u] * log_p[adjusted[u].argmax()])
    out = tiny_step(method, batch, LATE)
    assert out.logs["loss/unlabeled"].item() == pytest.approx(total / (2 * rows), rel=1e-4)
    assert torch.equal(out.pseudo.target, adjusted.argmax(1))
    assert torch.equal(out.pseudo.mask, mask)
    gained = torch.bincount(adjusted.argmax(1)[mask], minlength=CLASSES)
    assert torch.equal(method.used.counts, gained)
    assert torch.equal(method.bank.pushed, 2 * gained)


def test_the_log_has_the_rate_that_trains():
    trainer = make_trainer(semi(**SHORT))
    step = trainer.stages.at(10**9).first + 3  # three steps into the second stage
    assert trainer.rate_in_use(2) == trainer.learning_rate(2) > 0
    trainer.regroup(1)
    assert trainer.rate_in_use(step) == pytest.approx(0.2 * trainer.learning_rate(step))
    assert trainer.rate_in_use(step) > 0


@pytest.mark.parametrize("options", [{"balanced_head": False}, {"target": "soft"}, {"balanced_target": "mixed"}])
def test_pseudo_labels_that_the_balanced_head_does_not_have_are_refused(options):
    with pytest.raises(UserError, match="pseudo_labels=balanced needs balanced_head=true"):
        semi(pseudo_labels="balanced", **options)


def test_both_stages_are_recorded_as_one_graph_each_to_the_bit():
    recorder, said = FxRecorder(), []
    plain = run(make_trainer(semi(**SHORT)))
    assert_same(run(make_trainer(semi(**SHORT)), recorder, said), plain)
    assert said == []
    assert len(recorder.recordings) == 2


def test_the_network_is_compiled_for_the_images_of_each_stage_alone(monkeypatch):
    shapes, compile_ = [], torch.compile

    def backend(graph, inputs):
        shapes.append([tuple(x.shape) for x in inputs if isinstance(x, torch.Tensor) and x.dim() == 4])
        assert not any(isinstance(x, torch.SymInt) for x in inputs)
        return graph.forward

    monkeypatch.setattr(
        torch, "compile", lambda call, **given: compile_(call, **{**given, "backend": backend, "mode": None})
    )
    method = semi(labeled_share=0.5)
    torch._dynamo.reset()
    compile_parts(method, "default")
    for stage, step in itertools.product((0, 1), range(3)):
        batch, _ = tiny_prepared(method, tiny_batch(method, seed=step), tiny_context(step, stage=stage))
        method.net(batch.images)
    assert shapes == [[(6, 3, 4, 4)], [(36, 3, 4, 4)]]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_the_objective_compiles_once_a_stage():
    method, eager, (_, averaged) = semi(**SHORT), semi(**SHORT), averaged_by(semi())
    torch._dynamo.reset()  # forget what other tests compiled: all methods share this function
    compiled = torch.compile(method.objective, fullgraph=True, backend="aot_eager")
    for stage in (0, 1):
        for step in (0, 19, 20, 499):  # across the end of warm-up
            ctx, batch = tiny_context(step, stage=stage), tiny_batch(method, seed=step)
            seen, given = method.prepare(batch, method.inputs(batch, ctx), averaged)
            with torch._dynamo.config.patch(error_on_recompile=step > 0):
                out = compiled(forward_jointly(method.net, method.heads, seen), seen.labels, seen.rows, given)
            torch.testing.assert_close(out.loss, tiny_step(eager, batch, ctx, averaged).loss)
