"""Cases that take turns, and what is told of their rounds."""

import itertools
import json
import random

import numpy as np
import pytest
import torch

from benchmarks import common
from benchmarks.random_data import random_folder
from benchmarks.step import trainer_step
from benchmarks.step_parts import Cut
from semi_fast.observe.stopwatch import Stopwatch
from semi_fast.training.device import make_accelerator


def test_every_case_takes_a_turn_in_each_round_in_changing_order():
    taken: list[str] = []

    def case(name: str, seconds: float) -> common.Turn:
        return lambda: [seconds, taken.append(name)][0]

    parts = [case("b", 2.0), case("b", 3.0)]
    times = common.in_turns({"a": case("a", 1.0), "b": parts, "c": case("c", 4.0)}, rounds=20, warmup=1)
    assert {name: values.shape for name, values in times.items()} == {"a": (20, 1), "b": (20, 2), "c": (20, 1)}
    rounds = [taken[i : i + 4] for i in range(0, len(taken), 4)]
    assert len(rounds) == 21
    assert all(sorted(one) == ["a", "b", "b", "c"] for one in rounds)
    assert len({tuple(one) for one in rounds}) == 6
    assert common.fastest(times["b"]) == 5


def test_no_round_begins_after_the_time_is_over_but_for_three(monkeypatch):
    clock = itertools.count(0, 10)
    monkeypatch.setattr(common.time, "monotonic", lambda: next(clock))
    assert len(common.in_turns({"a": lambda: 1.0}, rounds=9, seconds=5)["a"]) == 3
    assert len(common.in_turns({"a": lambda: 1.0}, rounds=9, seconds=25)["a"]) == 5
    assert len(common.in_turns({"a": lambda: 1.0}, rounds=2, seconds=25)["a"]) == 2


@pytest.mark.parametrize(("least", "calls"), [(0.0, 1), (2.5, 1 + 3)])
def test_a_turn_lasts_as_long_as_asked_and_what_goes_before_a_call_is_not_in_it(least, calls):
    now, done = [0.0], []

    def advance(seconds: float) -> None:
        now[0] += seconds
        done.append(seconds)

    turn = common.timed(lambda: advance(1.0), least=least, of=4, before=lambda: advance(100.0), clock=lambda: now[0])
    assert turn() == 0.25
    assert done == [100.0, 1.0] * calls


def test_the_line_has_the_fastest_round_and_the_quartiles_of_each_case(capsys):
    rounds = np.array([5.0, 1.0, 2.0, 4.0, 3.0])[:, None] * 1e-6
    shuffled = np.array(random.Random(0).sample(rounds.tolist(), 5))
    common.report("name", {"a": 2.0041}, {"case": shuffled}, "view", side=32)
    line = json.loads(capsys.readouterr().out)
    assert line["cases"] == {"case": {"min": 1, "q1": 2, "median": 3, "q3": 4, "rounds": 5}}
    assert line["ratios"] == {"a": 2.0}
    assert (line["benchmark"], line["microseconds_of"], line["side"]) == ("name", "view", 32)
    assert line["hardware"]["torch"] == torch.__version__


def test_the_fastest_of_a_case_in_parts_is_that_of_each_part():
    told = common.spread(np.array([[1.0, 20.0], [10.0, 2.0]]) * 1e-6)
    assert told["min"] == 3
    assert told["median"] == 16.5


def test_a_network_that_is_cut_off_gets_the_same_gradients():
    torch.manual_seed(0)
    net, head, images = torch.nn.Linear(3, 4), torch.nn.Linear(4, 2), torch.randn(5, 3)
    net.num_features = 4
    torch.nn.functional.cross_entropy(head(net(images)), torch.tensor([0, 1, 1, 0, 1])).backward()
    plain = [parameter.grad for parameter in (*net.parameters(), *head.parameters())]
    net.zero_grad(), head.zero_grad()
    cut = Cut(net, Stopwatch(torch.device("cpu")))
    torch.nn.functional.cross_entropy(head(cut(images)), torch.tensor([0, 1, 1, 0, 1])).backward()
    cut.backward()
    assert all(map(torch.equal, plain, [p.grad for p in (*net.parameters(), *head.parameters())]))


def test_the_parts_of_a_step_add_up_to_it(tmp_path):
    random_folder(tmp_path, side=8)
    accel, _ = make_accelerator("fp32", torch.get_num_threads())
    parts = []
    step, close = trainer_step(tmp_path, "wrn10_1", accel, "fp32", False, parts=parts)
    took = parts[0].turn(step, 0)()
    close()
    (seconds,) = parts[0].rounds
    others = {"heads and losses", "guard", "averages", "batch", "the rest"}
    assert seconds.keys() == {"network", "optimizer"} | others
    assert 0 < sum(seconds.values()) <= took
    assert parts[0].beside_model() == pytest.approx(sum(seconds[part] for part in others) / sum(seconds.values()))
