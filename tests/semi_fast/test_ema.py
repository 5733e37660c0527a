"""The moving average against its formula, and swapping it in and out."""

import torch
from torch import nn

from semi_fast.training.ema import Ema
from semi_fast.training.schedules import cosine_7_16


def test_average_follows_the_formula():
    model = nn.Linear(3, 2)
    ema = Ema(model, 0.9)
    expected = {n: p.detach().clone() for n, p in model.named_parameters()}
    for _ in range(5):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        ema.update(model)
        expected = {n: 0.9 * expected[n] + 0.1 * p.detach() for n, p in model.named_parameters()}
    for name, value in ema.state_dict().items():
        torch.testing.assert_close(value, expected[name])


def test_swapping_restores_the_model_to_the_bit_even_after_an_error():
    model = nn.Sequential(nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last), nn.BatchNorm2d(4))
    ema = Ema(model, 0.5)
    with torch.no_grad():
        model[0].weight.add_(1)
    ema.update(model)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    try:
        with ema.swapped_in(model):
            assert torch.equal(model[0].weight, ema.average["0.weight"])
            assert not torch.equal(model[0].weight, before["0.weight"])
            raise RuntimeError("evaluation failed")
    except RuntimeError:
        pass
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_state_round_trip():
    model = nn.Linear(3, 2)
    ema = Ema(model, 0.5)
    ema.update(nn.Linear(3, 2))
    other = Ema(nn.Linear(3, 2), 0.5)
    other.load_state_dict(ema.state_dict())
    assert all(torch.equal(other.average[n], t) for n, t in ema.average.items())


def test_cosine_schedule_ends():
    assert cosine_7_16(0.0) == 1.0
    assert abs(cosine_7_16(1.0) - 0.19509) < 1e-5
