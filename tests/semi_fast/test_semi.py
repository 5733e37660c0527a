"""SeMi as a whole: warm-up, order of reading and updating, the ablations, compilation, several processes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from data_prep.errors import UserError
from semi_fast.methods import Context
from semi_fast.parts import losses
from semi_fast.parts.forward import Joint, forward_jointly
from tests.semi_fast.rank_worker import statistics_after_some_steps
from tests.semi_fast.tiny import CLASSES, COUNTS, tiny_batch, tiny_context, tiny_method, tiny_step

EARLY, LATE = tiny_context(5), tiny_context(400)
TAU = 0.5  # low enough that the untrained tiny network uses some of its pseudo-labels


def semi(**options):
    return tiny_method("semi", **{"tau": TAU, **options})


def trained_a_little(steps=4, **options):
    """A method whose bank and statistics have filled over some steps."""
    method = semi(**options)
    for step in range(steps):
        tiny_step(method, tiny_batch(method, seed=100 + step), LATE)
    return method


def joint_of(method, batch) -> Joint:
    return forward_jointly(method.net, method.heads, batch)


def parts_of(joint):
    """Labeled, weak and strong rows."""
    return joint["labeled"]["weak"], joint["unlabeled"]["weak"], joint["unlabeled"]["strong"]


def prepared(method, ctx=LATE):
    return method.inputs(tiny_batch(method), ctx)


def used(joint: Joint):
    q = joint["unlabeled"]["weak"].logits["standard"].softmax(1)
    assert 0 < (q.max(1).values >= TAU).sum() < len(q), "the batch must hold both used and unused pseudo-labels"
    return q


def test_warm_up_is_fixmatch_to_the_bit():
    method = semi(balanced_from="after_warmup")
    twin = tiny_method("fixmatch", tau=TAU, strong_views=2)
    twin.load_state_dict(method.state_dict(), strict=False)
    for step in range(5):  # the bank fills meanwhile and must not matter
        batch = tiny_batch(method, seed=step)
        used(joint_of(method, batch))
        out, expected = tiny_step(method, batch, EARLY), tiny_step(twin, batch, EARLY)
        assert torch.equal(out.loss, expected.loss)
        assert out.logs["loss/unlabeled"] > 0
        assert out.logs["loss/ea"] == out.logs["loss/balanced_labeled"] == out.logs["loss/balanced_unlabeled"] == 0
        method.zero_grad()
        twin.zero_grad()
        out.loss.backward()
        expected.loss.backward()
        for key, parameter in twin.named_parameters():
            torch.testing.assert_close(method.get_parameter(key).grad, parameter.grad, rtol=1e-6, atol=1e-8)
        assert method.heads["balanced"].weight.grad.abs().sum() == 0
    assert method.bank.counts.sum() > 0


def test_the_balanced_head_trains_during_warm_up_by_default():
    method = semi()
    out = tiny_step(method, tiny_batch(method), EARLY)
    assert out.logs["loss/balanced_labeled"] > 0
    assert out.logs["loss/ea"] == 0
    out.loss.backward()
    assert method.heads["balanced"].weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("warmup", "epoch", "live"), [(20, 19, False), (20, 20, True), (0, 0, True), (500, 499, False)]
)
def test_warm_up_ends_with_its_last_epoch(warmup, epoch, live):
    schedule = prepared(semi(warmup_epochs=warmup), Context(0, epoch, epoch / 500))
    assert schedule.live.item() == live
    assert schedule.gamma.item() == pytest.approx(0.4 * epoch / 500 if live else 0.0)


def test_a_step_reads_all_statistics_before_it_updates_them():
    """Recompute the loss of a step from the state before it, with the equations written out in their order."""
    method = trained_a_little(alpha=1.0, prototype_temperature=2.0)
    batch = tiny_batch(method, seed=7)
    with torch.no_grad():
        joint = joint_of(method, batch)
    q = used(joint)
    labeled, weak, strong = parts_of(joint)
    share = method.used.counts.double() / method.used.counts.sum()
    stored = [method.bank.embeddings[k, : method.bank.counts[k]].double() for k in range(CLASSES)]
    h, center = method.balanced_used.value.clone(), method.center.value.clone()
    assert share.max() < 1
    assert h.sum() > 0
    assert center.sum() > 0

    semantic = torch.zeros_like(q, dtype=torch.float64)
    for u in range(len(q)):
        for k in range(CLASSES):
            if len(stored[k]):
                semantic[u, k] = -torch.dist(strong.features[u].double(), stored[k].mean(0)) / 2.0
            else:
                semantic[u, k] = -torch.inf
    a = LATE.epoch / 500 * share[q.argmax(1)]
    mixed = (1 - a[:, None]) * q + a[:, None] * semantic.softmax(1)
    confidence, target = mixed.max(1)
    mask = confidence >= TAU
    hardness = 0.25 + 0.75 * torch.special.entr(mixed).sum(1) / torch.log(torch.tensor(CLASSES))
    ce = -strong.logits["standard"].log_softmax(1).view(2, len(q), CLASSES)
    unlabeled = sum(mask[u] * hardness[u] * ce[v, u, target[u]] for v in range(2) for u in range(len(q))) / (2 * len(q))
    teacher = ((weak.features - center) / (0.09 / 5)).softmax(1)
    cross = -(teacher.repeat(2, 1) * (strong.features / 0.09).log_softmax(1)).sum(1)
    ea = 0.15 * (cross * (~mask).repeat(2)).mean()
    labeled_prior = torch.tensor(COUNTS) / sum(COUNTS)
    prior = len(batch.labels["labeled"]) * labeled_prior + h
    log_prior = 2 * (prior / prior.sum()).log()
    adjusted = (weak.logits["standard"] - log_prior).softmax(1)
    sure = (adjusted.max(1).values >= TAU) | (weak.logits["balanced"].softmax(1).max(1).values >= TAU)
    ce_b = -strong.logits["balanced"].log_softmax(1).view(2, len(q), CLASSES)
    target_b = adjusted.argmax(1)
    unlabeled_b = sum(sure[u] * ce_b[v, u, target_b[u]] for v in range(2) for u in range(len(q))) / (2 * len(q))
    labeled_b = losses.labeled_loss(labeled.logits["balanced"] + 2 * labeled_prior.log(), batch.labels["labeled"])

    before = {key: value.clone() for key, value in method.state_dict().items()}
    out = tiny_step(method, batch, LATE)
    expected = {"unlabeled": unlabeled, "ea": ea, "balanced_labeled": labeled_b, "balanced_unlabeled": unlabeled_b}
    for part, value in expected.items():
        assert value > 0, part
        assert out.logs[f"loss/{part}"].item() == pytest.approx(float(value), rel=1e-4), part

    # ... and afterwards every statistic has taken in the step.
    gained = torch.bincount(target[mask], minlength=CLASSES)
    assert torch.equal(method.used.counts - before["used.counts"], gained)
    histogram = torch.bincount(target_b[sure], minlength=CLASSES).float()
    torch.testing.assert_close(method.balanced_used.value, 0.999 * h + 0.001 * histogram)
    torch.testing.assert_close(method.center.value, 0.9 * center + 0.1 * teacher.mean(0))
    assert method.bank.pushed.sum() - before["bank.pushed"].sum() == 2 * mask.sum()


def test_the_bank_stores_strong_view_features_under_their_own_pseudo_labels():
    method = semi(warmup_epochs=500)
    batch = tiny_batch(method)
    with torch.no_grad():
        joint = joint_of(method, batch)
    q = used(joint)
    tiny_step(method, batch, EARLY)
    for k in range(CLASSES):
        rows = [v * len(q) + u for v in range(2) for u in range(len(q)) if q[u].max() >= TAU and q[u].argmax() == k]
        assert method.bank.counts[k] == len(rows)
        torch.testing.assert_close(method.bank.embeddings[k, : len(rows)], parts_of(joint)[2].features[rows])
        expected = [float(q[row % len(q)].max()) for row in rows]
        assert method.bank.confidences[k, : len(rows)].tolist() == pytest.approx(expected)
        assert method.bank.rows[k, : len(rows)].tolist() == [int(batch.rows["unlabeled"][row % len(q)]) for row in rows]


def test_pseudo_labels_and_teacher_pass_no_gradient_to_the_weak_view():
    method = trained_a_little()
    batch = tiny_batch(method, seed=7)
    joint = joint_of(method, batch)
    weak = parts_of(joint)[1]
    rows = [*weak.logits.values(), weak.features]
    for tensor in rows:
        tensor.retain_grad()
    method.objective(joint, batch.labels, batch.rows, prepared(method)).loss.backward()
    assert all(tensor.grad is None for tensor in rows[:2])
    assert rows[2].grad is None or not rows[2].grad.any()


def logs_and_state(**options):
    method = semi(**options)
    for step in range(4):
        out = tiny_step(method, tiny_batch(semi(), seed=100 + step), LATE)
    return out.logs, method.state_dict()


def changed(**options):
    """Which logged figures the option changes at the fourth step, against the full method."""
    full, part = logs_and_state()[0], logs_and_state(**options)[0]
    return {key for key in full if key not in part or not torch.equal(full[key], part[key])}


def test_without_oheml_only_the_weight_of_examples_changes():
    assert changed(oheml=False) == {"loss/unlabeled", "pseudo/hardness"}
    assert logs_and_state(oheml=False)[0]["pseudo/hardness"] == 1


def test_without_ea_only_that_loss_is_missing():
    assert changed(ea=False) == {"loss/ea"}
    assert "loss/ea" not in logs_and_state(ea=False)[0]


def test_without_plce_pseudo_labels_are_linear_and_there_is_no_bank():
    logs, state = logs_and_state(plce=False)
    assert not any(key.startswith("bank") for key in [*logs, *state])
    assert logs["pseudo/mixing"] == 0
    assert not {"loss/labeled", "loss/balanced_labeled", "loss/balanced_unlabeled"} & changed(plce=False)
    assert {"loss/unlabeled", "pseudo/mixing"} <= changed(plce=False)


def test_without_the_balanced_head_the_standard_one_is_reported():
    assert changed(balanced_head=False) == {"loss/balanced_labeled", "loss/balanced_unlabeled", "pseudo/balanced_used"}
    method = semi(balanced_head=False)
    assert list(method.eval().predict(torch.randn(2, 3, 4, 4))) == ["standard"]
    assert list(semi().eval().predict(torch.randn(2, 3, 4, 4))) == ["balanced", "standard"]


def test_the_fifo_bank_changes_what_is_stored():
    _, full = logs_and_state(bank_size=2)
    _, fifo = logs_and_state(bank_size=2, bank="fifo")
    assert not torch.equal(full["bank.embeddings"], fifo["bank.embeddings"])
    assert changed(bank="fifo") == set(), "with room for all, both rules store the same"


def test_the_joint_prior_takes_running_pseudo_labels_in_and_the_labeled_one_does_not():
    outs = {}
    for prior in ("joint", "labeled"):
        for running in (0.0, 50.0):
            method = semi(prior=prior)
            method.balanced_used.value[-1] = running
            outs[prior, running] = tiny_step(method, tiny_batch(method), LATE).logs["loss/balanced_unlabeled"]
    assert outs["joint", 0.0] == outs["labeled", 0.0] == outs["labeled", 50.0], "it starts as the labeled one"
    assert outs["joint", 50.0] != outs["joint", 0.0]


@pytest.mark.parametrize("target", ["hard", "soft"])
def test_the_mixed_target_is_equation_11(target):
    """Mask of the balanced head's own adjusted prediction, target q', nothing adjusted inside the cross-entropy."""
    method = trained_a_little(balanced_target="mixed", plce=False, prior="labeled", target=target)
    batch = tiny_batch(method, seed=7)
    with torch.no_grad():
        joint = joint_of(method, batch)
    q, (_, weak, strong) = used(joint), parts_of(joint)
    log_prior = 2 * (torch.tensor(COUNTS) / sum(COUNTS)).log()
    mask = (weak.logits["balanced"] - log_prior).softmax(1).amax(1) > TAU
    assert not torch.equal(mask, q.amax(1) >= TAU), "the masks of the two heads must differ here"
    total = 0.0
    for v in range(2):
        for u in range(len(q)):
            log_p = strong.logits["balanced"][v * len(q) + u].log_softmax(0)
            if mask[u]:
                total -= float(log_p[q[u].argmax()] if target == "hard" else (q[u] * log_p).sum())
    out = tiny_step(method, batch, LATE)
    assert out.logs["loss/balanced_unlabeled"].item() == pytest.approx(total / (2 * len(q)), rel=1e-5)
    assert out.logs["pseudo/balanced_used"].item() == pytest.approx(float(mask.float().mean()))


def test_the_soft_target_is_the_mixed_pseudo_label_itself():
    """Eq. 9: cross-entropy of the strong views against q', with mask and hardness weight as they were."""
    method, hard = trained_a_little(target="soft", alpha=1.0), trained_a_little(alpha=1.0)
    hard.load_state_dict(method.state_dict())
    batch = tiny_batch(method, seed=7)
    with torch.no_grad():
        joint = joint_of(method, batch)
        q, (_, weak, strong) = used(joint), parts_of(joint)
        pseudo, mixed, hardness, _ = method._pseudo_labels(weak, strong, prepared(method))
    assert not torch.allclose(mixed, q), "the prototypes must have a say"
    total = 0.0
    for v in range(2):
        for u in range(len(q)):
            log_p = strong.logits["standard"][v * len(q) + u].log_softmax(0)
            total -= float(pseudo.mask[u] * hardness[u] * (mixed[u] * log_p).sum())
    out, other = tiny_step(method, batch, LATE), tiny_step(hard, batch, LATE)
    assert out.logs["loss/unlabeled"].item() == pytest.approx(total / (2 * len(q)), rel=1e-5)
    assert {key for key in out.logs if not torch.equal(out.logs[key], other.logs[key])} == {"loss/unlabeled"}


def test_the_relative_class_weight_does_not_shrink_with_the_number_of_classes():
    share, relative = trained_a_little(), trained_a_little(mixing_class_weight="relative")
    relative.load_state_dict(share.state_dict())
    batch = tiny_batch(share, seed=7)
    m = share.used.read()
    with torch.no_grad():
        joint = joint_of(share, batch)
    classes = used(joint).argmax(1)
    assert m.max() < 1
    gamma = 0.4 * LATE.epoch / 500
    assert tiny_step(share, batch, LATE).logs["pseudo/mixing"].item() == pytest.approx(
        float((gamma * m[classes]).mean())
    )
    mixing = tiny_step(relative, batch, LATE).logs["pseudo/mixing"].item()
    assert mixing == pytest.approx(float((gamma * m[classes] / m.max()).mean()))


def test_the_balanced_head_learns_from_the_bank():
    method = trained_a_little(bank_samples=64)
    batch = tiny_batch(method, seed=7)
    draws = prepared(method, tiny_context(400)).draws
    counts = method.bank.counts.tolist()
    filled = [k for k, count in enumerate(counts) if count]
    assert len(filled) > 1
    head, total, drawn = method.heads["balanced"], 0.0, []
    for which, entry in draws.tolist():
        k = filled[int(which * len(filled))]
        embedding = method.bank.embeddings[k, int(entry * counts[k])]
        total -= float(head(embedding).detach().log_softmax(0)[k])
        drawn.append(k)
    assert set(drawn) == set(filled), "every class with entries is drawn"
    out = tiny_step(method, batch, tiny_context(400))
    assert out.logs["loss/bank"].item() == pytest.approx(total / 64, rel=1e-5)
    parts = [value for key, value in out.logs.items() if key.startswith("loss/")]
    torch.testing.assert_close(torch.stack(parts).sum(), out.loss.detach())


def test_an_empty_bank_teaches_nothing():
    method = semi(bank_samples=8)
    out = tiny_step(method, tiny_batch(method), LATE)
    assert out.logs["loss/bank"] == 0
    out.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in method.parameters())


@pytest.mark.parametrize("options", [{"plce": False}, {"balanced_head": False}])
def test_samples_of_a_bank_that_is_not_there_are_refused(options):
    with pytest.raises(UserError, match="bank_samples=8 needs plce=true"):
        semi(bank_samples=8, **options)


# Dynamo looks at .grad of every input it wraps; inputs of the objective are results of the network, not leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize(
    "options",
    [{}, {"plce": False, "balanced_head": False, "ea": False}, {"bank_samples": 4, "target": "soft"}],
)
def test_the_objective_compiles_whole_and_never_again(options):
    method, eager = semi(**options), semi(**options)
    torch._dynamo.reset()  # forget what other tests compiled: all methods share this function
    compiled = torch.compile(method.objective, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in (0, 1, 2, 19, 20, 21, 300, 499):  # across the end of warm-up
            batch = tiny_batch(method, seed=step)
            out = compiled(joint_of(method, batch), batch.labels, batch.rows, prepared(method, tiny_context(step)))
            expected = tiny_step(eager, batch, tiny_context(step))
            torch.testing.assert_close(out.loss, expected.loss)
            out.loss.backward()
    for key, value in eager.state_dict().items():
        torch.testing.assert_close(method.state_dict()[key], value)


def test_two_processes_keep_the_state_of_one_with_the_same_global_batch(tmp_path, root):
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.semi_fast.rank_worker"]
    workers = [
        subprocess.Popen(
            [*command, str(rank), "2", str(tmp_path)], env=environment, cwd=root, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    for worker in workers:
        _, errors = worker.communicate(timeout=120)
        assert worker.returncode == 0, errors
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    alone = statistics_after_some_steps(0, 1)
    assert all(torch.equal(first[key], second[key]) for key in alone), "ranks must agree to the bit"
    assert (alone["bank.pushed"] > 3).any(), "some class must have replaced entries"
    for key, value in alone.items():
        if key == "center.value":  # a mean of means: the same up to rounding
            torch.testing.assert_close(first[key], value, rtol=1e-6, atol=1e-7)
        else:
            assert torch.equal(first[key], value), key
