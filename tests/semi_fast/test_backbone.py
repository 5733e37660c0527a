"""Networks of timm: what they compute, how their stem, normalization, layers and memory are set, and whole runs."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from data_prep.errors import UserError
from pipelines.reading import normalized, read_info
from semi_fast.commands.export import export
from semi_fast.config import load_settings
from semi_fast.methods import build_method
from semi_fast.nets import backbone, build_net, depth_groups
from semi_fast.nets.backbone import import_timm
from semi_fast.nets.weights import load_weights, smaller_kernel
from semi_fast.run.checkpoint import list_checkpoints, newest_checkpoint
from semi_fast.run.saved import load_trained
from semi_fast.train import cli
from tests.semi_fast.outcome import assert_same, outcome
from tests.semi_fast.tiny import tiny_info
from tests.semi_fast.trained_runs import command, train

INFO = tiny_info()._replace(resolution=32, mean=(0.2, 0.3, 0.4), std=(0.1, 0.2, 0.3))

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])  # of ImageNet


@pytest.fixture(scope="module", autouse=True)
def timm():
    """The package, where it is installed and can be imported."""
    try:
        return import_timm()
    except UserError as error:
        pytest.skip(str(error))


def net_of(name: str, **options) -> nn.Module:
    torch.manual_seed(0)
    return build_net(f"timm/{name}", bn_momentum=0.1, info=INFO, **options).eval()


def images(count: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels / 255 in [0, 1], and as the data set normalizes them."""
    shares = torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (INFO.mean, INFO.std))
    return shares, (shares - mean) / std


def save(model: nn.Module, path) -> str:
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)
    return str(path)


@pytest.mark.parametrize(
    ("name", "maps"),
    [
        ("resnet18", (512, 1, 1)),
        ("vit_tiny_patch16_224", None),
        ("convnext_atto", (320, 1, 1)),
        ("mobilenetv3_small_050", None),
    ],
)
def test_features_and_maps_are_those_of_timm_on_images_normalized_as_its_weights_know_them(name, maps):
    net = net_of(name, normalize="weights")
    shares, given = images()
    facts = net.model.pretrained_cfg
    wanted = (shares - torch.tensor(facts["mean"]).view(1, 3, 1, 1)) / torch.tensor(facts["std"]).view(1, 3, 1, 1)
    with torch.no_grad():
        features = net(given)
        torch.testing.assert_close(features, net.model(wanted), rtol=1e-3, atol=1e-4)
        assert features.shape == (3, net.num_features)
        assert hasattr(net, "maps") == (maps is not None)
        if maps:
            assert net.maps(given).shape == (3, *maps)
        assert torch.equal(net_of(name)(given), net_of(name).model(given)), "by default as they come"
    names = [prefix for group in net.depths() for prefix in group]
    for parameter, _ in net.named_parameters():
        assert sum(parameter == prefix or parameter.startswith(f"{prefix}.") for prefix in names) == 1, parameter


def test_maps_are_by_channel_where_timm_has_them_by_place(timm, monkeypatch):
    small = {"embed_dim": 24, "depths": (1, 1), "num_heads": (1, 2)}
    model = timm.create_model("swin_tiny_patch4_window7_224", num_classes=0, img_size=32, **small)
    monkeypatch.setattr(backbone, "make_model", lambda *_: model)
    net = net_of("swin_tiny_patch4_window7_224")
    assert model.forward_features(images()[1]).shape == (3, 4, 4, 48)
    with torch.no_grad():
        assert net.maps(images()[1]).shape == (3, 48, 4, 4)
        torch.testing.assert_close(net.maps(images()[1]).mean((2, 3)), net(images()[1]))


def test_maps_are_averaged_to_the_features_of_a_residual_network():
    net, (_, given) = net_of("resnet18", stem="small"), images()
    with torch.no_grad():
        assert net.maps(given).shape == (3, 512, 4, 4)
        torch.testing.assert_close(net.maps(given).mean((2, 3)), net(given))


def test_methods_that_need_maps_refuse_tokens():
    build_method("bem_like", net_of("test_resnet"), INFO)
    with pytest.raises(UserError, match=r"needs features by place \(n, d, h, w\)"):
        build_method("bem_like", net_of("test_vit"), INFO)


def test_the_nearest_name_is_named():
    with pytest.raises(UserError, match=r"Unknown net 'timm/resnet81'\. Did you mean timm/resnet18 or ") as e:
        net_of("resnet81")
    assert len(str(e.value)) < 200
    with pytest.raises(UserError, match=r"Unknown net 'timm/qqqqqqqqq'\. timm has 3,"):
        net_of("qqqqqqqqq")
    assert net_of("test_resnet.r160_in1k").num_features == 96


def test_images_too_small_are_refused_in_one_line():
    with pytest.raises(UserError, match=r"net=timm/vit_tiny_patch16_224 takes no images of 8 px") as e:
        build_net("timm/vit_tiny_patch16_224", bn_momentum=0.1, info=INFO._replace(resolution=8))
    assert "\n" not in str(e.value)


def test_a_small_stem_keeps_the_resolution_and_weights_are_adapted(timm, tmp_path):
    model = timm.create_model("resnet18", num_classes=7)
    file = save(model, tmp_path / "w.safetensors")
    net = net_of("resnet18", stem="small")
    said = load_weights(net, "timm/resnet18", file, 32)
    assert said.endswith("left out: the head of 7 classes (fc.bias, fc.weight); conv1.weight made 3x3 from 7x7")
    torch.testing.assert_close(net.model.conv1.weight, smaller_kernel(model.conv1.weight.detach(), 3))
    assert torch.equal(net.model.layer4[1].conv2.weight, model.layer4[1].conv2.weight)
    sides = []
    net.model.layer1.register_forward_hook(lambda m, x, y: sides.append((x[0].shape[-1], y.shape[-1])))
    net(images()[1])
    assert sides == [(32, 32)]
    for name, first in (("test_efficientnet", "conv_stem"), ("test_resnet", "conv1.0")):
        assert net_of(name, stem="small").model.get_submodule(first).stride == (1, 1)
    for name in ("test_convnext", "test_vit"):
        with pytest.raises(UserError, match=rf"net\.stem=small is for a stem .*net=timm/{name} has none"):
            net_of(name, stem="small")


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "convnext_atto"])
def test_weights_saved_from_timm_are_loaded(timm, tmp_path, name):
    torch.manual_seed(5)
    sized = {"img_size": 64} if name.startswith("vit") else {}
    model = timm.create_model(name, num_classes=11, **sized).eval()
    net = net_of(name)
    said = load_weights(net, f"timm/{name}", save(model, tmp_path / "w.safetensors"), 32)
    assert "the head of 11 classes" in said
    given, own = model.state_dict(), net.model.state_dict()
    changed = {key for key in own if not torch.equal(own[key], given[key])}
    assert changed == ({"pos_embed"} if sized else set())
    if sized:
        assert "pos_embed of 17 tokens made one of 5" in said
        assert torch.equal(own["pos_embed"][:, 0], given["pos_embed"][:, 0]), "the class token's place"
    with pytest.raises(UserError, match=r"does not fit net=timm/test_resnet: missing: .* more.*another architecture"):
        load_weights(net_of("test_resnet"), "timm/test_resnet", str(tmp_path / "w.safetensors"), 32)


def test_pretrained_weights_are_those_that_timm_loads(timm, tmp_path, monkeypatch):
    """As downloaded: timm reads them from a file instead, and fits them to the size of the images."""
    torch.manual_seed(6)
    model = timm.create_model("test_vit", num_classes=1000)
    file, create = save(model, tmp_path / "w.safetensors"), timm.create_model

    def from_file(name, pretrained=False, **options):
        overlay = {"file": file} if pretrained else None
        return create(name, pretrained=pretrained, pretrained_cfg_overlay=overlay, **options)

    monkeypatch.setattr(timm, "create_model", from_file)
    net = net_of("test_vit")
    state = torch.get_rng_state()
    assert load_weights(net, "timm/test_vit", "pretrained", 32).endswith("tensors of pretrained")
    assert torch.equal(torch.get_rng_state(), state)
    given, own = model.state_dict(), {key: value.clone() for key, value in net.model.state_dict().items()}
    assert {key for key in own if not torch.equal(own[key], given[key])} == {"pos_embed"}
    with torch.no_grad():
        net.model.pos_embed.zero_()
        load_weights(net, "timm/test_vit", file, 32)
        torch.testing.assert_close(net.model.pos_embed, own["pos_embed"], msg="a file is resampled as timm does it")


def test_without_a_network_pretrained_weights_are_one_clear_line_and_no_run(monkeypatch, digits, tmp_path, capsys):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    words = ["net=timm/resnet10t", "net.weights=pretrained", f"data={digits}", f"run_dir={tmp_path / 'run'}"]
    assert cli([*words, "wandb=off", "ceiling=off", "steps=2", "threads=1"]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: timm's weights for net=timm/resnet10t cannot be had: ")
    assert "\n" not in said
    assert not (tmp_path / "run").exists()


def test_layers_learn_at_the_rates_of_timm_s_own_rule(timm):
    """Those of timm.optim.param_groups_layer_decay for a network with its head."""
    from timm.models import group_parameters

    net = net_of("vit_tiny_patch16_224")
    whole = timm.create_model("vit_tiny_patch16_224", num_classes=3)
    layers = group_parameters(whole, whole.group_matcher(coarse=False), reverse=True)
    last = layers["head.weight"]
    groups = depth_groups(net, freeze=0, decay=0.5)
    for name, _ in net.named_parameters():
        held = [g for g in groups if f"net.{name}" == g.prefix or f"net.{name}".startswith(f"{g.prefix}.")]
        assert held[0].factor == 0.5 ** (last - layers[name.removeprefix("model.")])
    assert len(groups) < 20, "modules, not parameters"
    frozen = [g.prefix for g in depth_groups(net, freeze=2, decay=1.0) if g.frozen]
    assert frozen == [f"net.model.{part}" for part in ("cls_token", "pos_embed", "patch_embed", "blocks.0")]


def test_checkpointing_gives_the_same_gradients_and_is_refused_with_batchnorm():
    gradients = []
    for checkpointing in (False, True):
        net = net_of("test_vit", checkpointing=checkpointing).train()
        net(images()[1]).square().sum().backward()
        gradients.append([p.grad for p in net.parameters()])
        assert net.model.grad_checkpointing == checkpointing
    assert all(torch.equal(one, two) for one, two in zip(*gradients, strict=True))
    with pytest.raises(UserError, match=r"statistics of BatchNorm, which net=timm/test_resnet has"):
        net_of("test_resnet", checkpointing=True)


def test_every_batchnorm_has_the_momentum_of_the_settings_and_weights_are_channels_last():
    net = net_of("test_efficientnet")
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) > 10
    assert {norm.momentum for norm in norms} == {0.1}
    assert net.model.conv_stem.weight.is_contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        assert net(images()[1].bfloat16()).dtype == torch.bfloat16


def test_a_run_from_weights_to_report_predictions_and_onnx_and_back(timm, digits, tmp_path, capsys, quick):
    torch.manual_seed(4)
    file = save(timm.create_model("resnet18", num_classes=5), tmp_path / "resnet18.safetensors")
    more = ["net=timm/resnet18", f"net.weights={file}", "net.freeze=2", "optim.layer_decay=0.75"]
    more += ["save_every=3", "batch=4", "method.strong_views=1", "report=on"]
    run = train(tmp_path / "run", digits, *more, method="fixmatch")
    assert "network:   timm/resnet18, 11.18 M parameters" in capsys.readouterr().out
    last = newest_checkpoint(run / "checkpoints").tensors
    for name in ("bn1.running_mean", "layer1.0.conv1.weight", "layer1.0.bn1.running_var"):
        assert torch.equal(last["model"][f"net.model.{name}"], load_file(file)[name])
    assert not torch.equal(last["model"]["net.model.layer4.1.conv1.weight"], load_file(file)["layer4.1.conv1.weight"])
    torch.testing.assert_close(last["model"]["net.mean"].flatten(), MEAN)

    # As if it had ended after step 3.
    parts = tmp_path / "parts"
    shutil.copytree(run, parts)
    (parts / "summary.json").unlink()
    for path in list_checkpoints(parts / "checkpoints"):
        if path.name != "step-000000003":
            shutil.rmtree(path)
    train(parts, digits, *more, method="fixmatch")
    assert_same(outcome(parts), outcome(run))

    assert "timm/resnet18" in (run / "report.html").read_text()
    capsys.readouterr()
    assert command("evaluate", run, "--json") == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["figures"][figures["reported"]]["accuracy"] == pytest.approx(
        json.loads((run / "summary.json").read_text())["accuracy_last"]
    )
    trained, info = load_trained(run), read_info(digits)
    pixels = np.load(digits / "test.npy")[:4]
    wanted = trained.logits(normalized(pixels, info))["standard"]
    slow = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    slow = (slow - MEAN.view(1, 3, 1, 1)) / STD.view(1, 3, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(
            trained.method.heads["standard"](trained.method.net.model(slow)), wanted, rtol=1e-3, atol=1e-3
        )
    export(run, tmp_path / "model.onnx", weights=None, step=None)
    import onnxruntime

    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    logits = session.run(["logits"], {"images": pixels.transpose(0, 3, 1, 2)})[0]
    np.testing.assert_allclose(logits, wanted, rtol=1e-3, atol=1e-3)
    facts = session.get_modelmeta().custom_metadata_map
    assert json.loads(facts["mean"]) == pytest.approx(MEAN.tolist())
    assert json.loads(facts["std"]) == pytest.approx(STD.tolist())


def test_normalization_is_that_of_the_weights_where_there_are_any():
    def chosen(*words):
        return load_settings(words).net.structure()["normalize"]

    assert chosen("net=timm/resnet18") == "data"
    assert chosen("net=timm/resnet18", "net.weights=pretrained") == "weights"
    assert chosen("net=timm/resnet18", "net.weights=x.safetensors", "net.normalize=data") == "data"
    assert chosen("net=timm/resnet18", "net.normalize=weights") == "weights"
    assert chosen("net.weights=x.safetensors") == "data"
