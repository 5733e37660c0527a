"""Weights to start from, and what of a network is trained, and how fast: with the project's own networks."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import nn

from data_prep.errors import UserError
from semi_fast.config import OptimSettings, load_settings
from semi_fast.nets import build_net, depth_groups
from semi_fast.nets.backbone import import_timm
from semi_fast.nets.weights import load_weights, smaller_kernel
from semi_fast.parts.groups import ParamGroup, combined, group_of
from semi_fast.run.checkpoint import load_checkpoint
from semi_fast.train import cli
from semi_fast.training.optim import build_optimizer
from tests.semi_fast.outcome import assert_same, outcome
from tests.semi_fast.trained_runs import train


def weights_of(net: nn.Module, path, **more) -> str:
    save_file({**{name: tensor.contiguous() for name, tensor in net.state_dict().items()}, **more}, path)
    return str(path)


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> str:
    """The weights of a wrn10_1 with a head of 1,000 classes; its statistics are those of a network that has trained."""
    torch.manual_seed(3)
    net = build_net("wrn10_1", bn_momentum=0.5)
    net(torch.randn(8, 3, 8, 8))
    head = {"fc.weight": torch.zeros(1000, 64), "fc.bias": torch.zeros(1000)}
    return weights_of(net, tmp_path_factory.mktemp("weights") / "wrn.safetensors", **head)


def load(net: str, weights: str) -> tuple[nn.Module, str]:
    made = build_net(net, bn_momentum=0.1)
    return made, load_weights(made, net, weights, 8)


def test_weights_are_loaded_and_the_head_is_left_out_and_said(file):
    net, said = load("wrn10_1", file)
    given = load_file(file)
    assert all(torch.equal(tensor, given[name]) for name, tensor in net.state_dict().items() if "tracked" not in name)
    assert said.endswith(f"tensors of {file}; left out: the head of 1,000 classes (fc.bias, fc.weight)")
    assert net.stem.weight.is_contiguous(memory_format=torch.channels_last)


def test_weights_of_another_architecture_are_refused_by_name_and_nothing_is_copied(file):
    net = build_net("wrn10_2", bn_momentum=0.1)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with pytest.raises(
        UserError, match=r"not fit net=wrn10_2: missing: .*; of another shape: blocks\.0\.bn2\.bias is \(16,\)"
    ) as e:
        load_weights(net, "wrn10_2", file, 8)
    assert "needed (32,)" in str(e.value)
    assert str(e.value).count(" is (") == 4
    assert "more. Those are weights of another architecture" in str(e.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    with pytest.raises(UserError, match=r"net=resnet50: missing: .* more; unexpected: .*; of another shape: "):
        load("resnet50", file)


def test_what_lacks_or_exceeds_is_named(file, tmp_path):
    tensors = load_file(file)
    del tensors["stem.weight"]
    save_file(tensors | {"odd": torch.zeros(2)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"missing: stem\.weight; unexpected: odd\. "):
        load("wrn10_1", str(tmp_path / "x.safetensors"))


@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
def test_weights_that_are_no_numbers_are_refused_by_name_and_nothing_is_copied(file, tmp_path, value):
    tensors = load_file(file)
    tensors["bn.weight"][3] = value
    save_file(tensors, tmp_path / "x.safetensors")
    net = build_net("wrn10_1", bn_momentum=0.1)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with pytest.raises(UserError, match=r"has NaN or infinite values in tensors: bn\.weight\. .* give other weights"):
        load_weights(net, "wrn10_1", str(tmp_path / "x.safetensors"), 8)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


@pytest.mark.parametrize("suffix", ["pth", "bin", "pt", "ckpt"])
def test_a_pickle_is_never_opened(tmp_path, suffix):
    path = tmp_path / f"weights.{suffix}"
    torch.save({}, path)
    with pytest.raises(UserError, match=r"is a pickle, .* never opened\. Convert it .*safetensors\.torch\.save_file"):
        load("wrn10_1", str(path))


def test_other_files_are_refused_in_one_line(file, tmp_path):
    with pytest.raises(UserError, match="there is no such file"):
        load("wrn10_1", str(tmp_path / "none.safetensors"))
    for content in (b"", b"no safetensors at all", Path(file).read_bytes()[:5000]):
        broken = tmp_path / "broken.safetensors"
        broken.write_bytes(content)
        with pytest.raises(UserError, match="is no safetensors file, or a damaged one") as e:
            load("wrn10_1", str(broken))
        assert "\n" not in str(e.value)
    save_file({"net.stem.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"is a run's checkpoint\. Set start_from"):
        load("wrn10_1", str(tmp_path / "model.safetensors"))
    with pytest.raises(UserError, match=r"net\.weights=pretrained is for timm/<name>, got net=wrn10_1"):
        load("wrn10_1", "pretrained")


@pytest.mark.parametrize("old", [3, 5, 7, 11])
def test_a_smaller_kernel_answers_as_the_old_one_to_the_image_enlarged(old):
    torch.manual_seed(old)
    kernel, image = torch.randn(4, 3, old, old), torch.randn(3, 3, 3)
    # On a common grid: each of the image's 3 pixels is `old` wide, each of the kernel's cells 3.
    enlarged = np.kron(image, np.ones((1, old, old)))
    spread = np.kron(kernel, np.ones((1, 1, 3, 3))) / 9
    expected = (enlarged * spread).sum((1, 2, 3))
    np.testing.assert_allclose((smaller_kernel(kernel, 3) * image).sum((1, 2, 3)), expected, atol=1e-5)


def test_each_group_of_layers_learns_at_its_own_rate():
    net = build_net("wrn16_1", bn_momentum=0.1)
    method = nn.Module()
    method.net, method.heads = net, nn.ModuleDict({"standard": nn.Linear(64, 3)})
    groups = depth_groups(net, freeze=2, decay=0.5)
    optimizer = build_optimizer(method, OptimSettings(lr=0.1), groups)
    rates = {id(p): float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}
    # The stem and six blocks, the last of them with the closing BatchNorm.
    for name, parameter in method.named_parameters():
        part = name.split(".")
        depth = {"stem": 0, "blocks": 1 + int(part[2]) if part[1] == "blocks" else 0, "bn": 6}.get(part[1], 7)
        assert parameter.requires_grad == (depth >= 2)
        if depth < 2:
            assert id(parameter) not in rates
        else:
            assert rates[id(parameter)] == pytest.approx(0.1 * 0.5 ** (7 - depth)), name
    assert depth_groups(net, freeze=0, decay=1.0) == ()
    assert all(group.frozen for group in depth_groups(net, freeze=7, decay=1.0))
    with pytest.raises(UserError, match=r"net\.freeze=8 is more than the 7 groups"):
        depth_groups(net, freeze=8, decay=1.0)


@pytest.mark.parametrize("name", ["wrn16_1", "resnet50"])
def test_every_parameter_is_in_one_group_of_its_network(name):
    net = build_net(name, bn_momentum=0.1)
    prefixes = [prefix for group in net.depths() for prefix in group]
    for parameter, _ in net.named_parameters():
        assert sum(parameter.startswith(f"{prefix}.") for prefix in prefixes) == 1, parameter


def test_a_method_s_groups_and_the_network_s_hold_at_once():
    names = ["net.stem.weight", "net.a.weight", "net.a.bias", "net.b.weight", "heads.x.weight"]
    method = (ParamGroup("net", 0.5), ParamGroup("net.a.bias", frozen=True), ParamGroup("heads", 2.0))
    network = (ParamGroup("net.stem", 0.25, frozen=True), ParamGroup("net.a", 0.5), ParamGroup("net.b"))
    both = combined(method, network, names)
    found = {name: group_of(name, both) for name in names}
    assert {name: (group.factor, group.frozen) for name, group in found.items()} == {
        "net.stem.weight": (0.125, True),
        "net.a.weight": (0.25, False),
        "net.a.bias": (0.5, True),
        "net.b.weight": (0.5, False),
        "heads.x.weight": (2.0, False),
    }
    assert set(both) == set(found.values()), "none without a parameter"
    assert combined((ParamGroup("net", frozen=True),), network[1:2], names)[-1].frozen
    assert combined((), network, names) == network
    assert combined(method, (), names) == method


FINE = ["net.freeze=2", "optim.layer_decay=0.5", "save_every=3", "precision=fp32"]


def test_a_run_starts_from_a_file_and_what_is_frozen_never_moves(digits, file, tmp_path, capsys):
    run = train(tmp_path / "run", digits, f"net.weights={file}", *FINE, method="fixmatch")
    out = capsys.readouterr().out
    assert f"weights: {len(load_file(file)) - 2 - 7} tensors of {file}" in out
    assert "first 2 groups frozen" in out
    assert "layer decay 0.5" in out
    given, last = load_file(file), load_checkpoint(run / "checkpoints/step-000000006").tensors
    still = {name for name in given if name.startswith(("stem.", "blocks.0.")) and "tracked" not in name}
    assert {"stem.weight", "blocks.0.bn2.running_var"} < still
    for name in still:
        assert torch.equal(last["model"][f"net.{name}"], given[name]), name
        if f"net.{name}" in last["ema"]:
            assert torch.equal(last["ema"][f"net.{name}"], given[name]), name
    for name in ("blocks.1.conv1.weight", "blocks.1.bn2.running_var", "bn.weight"):
        moved = (last["model"][f"net.{name}"] - given[name]).abs().max()
        assert 0 < moved < 0.6, f"{name} began as in the file"
    assert not any(key.startswith("net.stem") for key in last["optimizer"])


def test_a_resumed_run_equals_an_uninterrupted_one_and_goes_on_with_no_other_file(digits, file, tmp_path, capsys):
    weights = tmp_path / "w.safetensors"
    shutil.copy(file, weights)
    more = [f"net.weights={weights}", *FINE]
    whole = train(tmp_path / "whole", digits, *more, method="fixmatch")
    config = yaml.safe_load((whole / "config.yaml").read_text())
    assert len(config["net"]["sha256"]) == 64
    parts = tmp_path / "parts"
    shutil.copytree(whole, parts)
    (parts / "summary.json").unlink()
    shutil.rmtree(parts / "checkpoints/step-000000006")
    tensors = load_file(file)
    save_file(tensors | {"stem.weight": tensors["stem.weight"] + 1}, weights)
    with pytest.raises(UserError, match=r"other settings \(net\.sha256: now \w+, saved \w+\)"):
        train(parts, digits, *more, method="fixmatch")
    with pytest.raises(UserError, match=r"has the SHA-256 \w+, and net\.sha256 is"):
        train(parts, digits, *more, f"net.sha256={config['net']['sha256']}", method="fixmatch")
    shutil.copy(file, weights)
    capsys.readouterr()
    train(parts, digits, *more, method="fixmatch")
    assert "weights: " not in capsys.readouterr().out, "they are loaded once"
    assert_same(outcome(parts), outcome(whole))


def test_weights_that_do_not_fit_end_a_run_before_its_folder_is_made(digits, file, tmp_path, capsys):
    for words, said in (
        (["net=wrn10_2", f"net.weights={file}"], "does not fit net=wrn10_2"),
        (["net=wrn10_1", "net.weights=nowhere.safetensors"], "there is no such file"),
        (["net=wrn10_1", "net.weights=pretrained"], "is for timm/<name>"),
    ):
        assert cli([f"data={digits}", f"run_dir={tmp_path / 'run'}", "threads=1", "wandb=off", *words]) == 2
        assert said in capsys.readouterr().err
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["net.freeze=1"], r"net\.freeze=1 keeps weights as they were loaded, and none are: set net\.weights or"),
        (
            ["net.weights=a.safetensors", "start_from=runs/x"],
            r"^start_from=runs/x and net\.weights=a\.safetensors exclude",
        ),
        (["net.sha256=abc"], r"sha256 is that of a file of weights, got weights=None"),
        (["optim.layer_decay=0"], r"optim\.layer_decay: input should be greater than 0"),
        (["net.freeze=-1"], r"net\.freeze: input should be greater than or equal to 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(words, message):
    with pytest.raises(UserError, match=message):
        load_settings(words)


@pytest.mark.parametrize("option", [{"stem": "small"}, {"normalize": "weights"}, {"checkpointing": True}])
def test_options_of_timm_s_networks_are_refused_for_others(option):
    for name in ("wrn10_1", "resnet50"):
        with pytest.raises(UserError, match=rf"net\.{next(iter(option))}.* is for timm/<name>.*, got net={name}"):
            build_net(name, bn_momentum=0.1, **option)


def test_without_timm_one_line_says_how_it_is_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"needs timm\. Install it: pip install -e '\.\[timm\]'"):
        import_timm()


@pytest.mark.parametrize(
    "error", ["RuntimeError('operator torchvision::nms does not exist')", "ImportError('no\\n x')"]
)
def test_a_timm_that_cannot_be_imported_is_one_line(monkeypatch, tmp_path, error):
    (tmp_path / "timm.py").write_text(f"raise {error}")
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=rf"timm can't be imported: .*must fit torch {torch.__version__[:4]}") as e:
        import_timm()
    assert "\n" not in str(e.value)
