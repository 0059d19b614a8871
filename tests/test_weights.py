"""Claims about weights.py."""

import argparse
import sys
from pathlib import Path

import pytest
import timm
import torch
from helpers import TINY, Code, randomised
from test_model import relative_error

import weights
from fcmae import FCMAE
from model import MODELS, SIZES, ConvNeXt
from plumbing.script import UserError

WRITTEN = ("authors", "timm", "hf", "mmpretrain")


def net(seed: int = 0, **kwargs) -> ConvNeXt:
    torch.manual_seed(seed)
    return randomised(ConvNeXt(**TINY | dict(num_classes=5) | kwargs), seed).eval()


def assert_equal(a: dict, b: dict):
    """The same names in the same order, and the same values."""
    assert list(a) == list(b)
    for key in a:
        assert a[key].shape == b[key].shape and torch.equal(a[key], b[key]), key


def assert_user_error(words: str, call, *args):
    with pytest.raises(UserError, match=r"^[^\n]+$") as error:
        call(*args)
    assert words in str(error.value)


def sparse_layout(state: dict) -> dict:
    """An encoder's tensors as the authors' pre-training code names and shapes them, kernels filled tap by tap."""
    sparse = {}
    for key, value in state.items():
        module, kind = key.rsplit(".", 1)
        downsampling = module.startswith("downsample_layers.") and not module.startswith("downsample_layers.0.")
        if ".grn" in module:
            sparse[key] = value.reshape(1, -1)
        elif module.endswith(("pwconv1", "pwconv2")):
            sparse[f"{module}.linear.{kind}"] = value
        elif module.endswith(".norm") or (downsampling and module.endswith(".0")):
            sparse[f"{module}.ln.{kind}"] = value
        elif not (downsampling or module.endswith("dwconv")):
            sparse[key] = value
        elif kind == "bias":
            sparse[key] = value[None]
        else:
            o, i, k, _ = value.shape
            kernel = torch.zeros(k * k, i, o)
            for y in range(k):
                for x in range(k):
                    kernel[x * k + y] = value[:, :, y, x].T
            sparse[f"{module}.kernel"] = kernel if downsampling else kernel[:, 0]
    return {f"encoder.{key}": value for key, value in sparse.items()}


# --- layouts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_every_size_round_trips_through_every_layout(name):
    with torch.device("meta"):
        state = MODELS[name](num_classes=1000).state_dict()
    shapes = {key: value.shape for key, value in state.items()}
    for layout in WRITTEN:
        written = weights.from_native(state, layout)
        assert weights.detect_layout(written) == ("native" if layout == "authors" else layout)
        assert {key: value.shape for key, value in weights.to_native(written).items()} == shapes
    found = weights.architecture(state)
    depths, dims = SIZES[name.split("_")[1]]
    version = 2 if "v2" in name else 1
    assert found == dict(depths=depths, dims=dims, version=version, num_classes=1000, in_chans=3, stem_stride=4)


@pytest.mark.parametrize("name", [name for name in MODELS if "yocto" not in name])
def test_written_names_and_shapes_are_those_of_timms_own_models(name):
    with torch.device("meta"):
        state, theirs = MODELS[name]().state_dict(), timm.create_model(name).state_dict()
    written = weights.from_native(state, "timm")
    assert {k: v.shape for k, v in written.items()} == {k: v.shape for k, v in theirs.items()}


@pytest.mark.parametrize("kwargs", [{}, {"version": 1}, {"num_classes": 0}, {"in_chans": 1, "stem_stride": 2}])
@pytest.mark.parametrize("layout", WRITTEN)
def test_values_round_trip(layout, kwargs):
    state = net(**kwargs).state_dict()
    assert_equal(weights.to_native(weights.from_native(state, layout)), state)
    other = ConvNeXt(**weights.architecture(state))
    report = weights.load_weights(other, weights.to_native(weights.from_native(state, layout)))
    assert_equal(other.state_dict(), state)
    assert report == [f"loaded {len(state)} of the model's {len(state)} tensors"]


def timm_model(version: int) -> torch.nn.Module:
    kind = dict(ls_init_value=1e-6) if version == 1 else dict(use_grn=True, ls_init_value=None)
    return timm.models.ConvNeXt(**TINY, num_classes=5, conv_mlp=True, **kind)


def transformers_model(version: int, **config) -> torch.nn.Module:
    transformers = pytest.importorskip("transformers")
    name = "ConvNextV2" if version == 2 else "ConvNext"
    config = getattr(transformers, f"{name}Config")(
        depths=list(TINY["depths"]), hidden_sizes=list(TINY["dims"]), num_labels=5, **config
    )  # fmt: skip
    return getattr(transformers, f"{name}ForImageClassification")(config)


@torch.no_grad()
def error_of_logits(theirs: torch.nn.Module, layout: str, version: int, scale: float) -> float:
    """Relative error of their logits from ours in float64; a small scale brings every norm's input down to its eps."""
    ours, theirs = net(version=version).double(), theirs.double().eval()
    for module in ours.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)) and module is not ours.head:
            module.weight *= scale
            module.bias *= scale
    written = weights.from_native(ours.state_dict(), layout)
    theirs.load_state_dict(written)
    assert_equal(weights.to_native({key: theirs.state_dict()[key] for key in written}), ours.state_dict())
    x = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    logits = theirs(x)
    return relative_error(getattr(logits, "logits", logits), ours(x))


@pytest.mark.parametrize("scale", [1, 1e-3])
@pytest.mark.parametrize("version", [2, 1])
def test_logits_equal_timms_also_where_eps_matters(version, scale):
    assert error_of_logits(timm_model(version), "timm", version, scale) < 1e-10


@pytest.mark.parametrize("scale", [1, 1e-3])
@pytest.mark.parametrize("version", [2, 1])
def test_logits_equal_transformers_also_where_eps_matters(version, scale):
    assert error_of_logits(transformers_model(version, layer_norm_eps=1e-6), "hf", version, scale) < 1e-10


def test_transformers_default_eps_differs_in_the_final_norm_and_rarely_matters():
    assert error_of_logits(transformers_model(2), "hf", 2, 1) < 1e-5
    assert error_of_logits(transformers_model(2), "hf", 2, 1e-3) > 1e-2


@pytest.mark.parametrize("version", [2, 1])
def test_a_transformers_base_model_is_an_encoder_with_norm(version):
    state = net(version=version).state_dict()
    base = {k.split(".", 1)[1]: v for k, v in weights.from_native(state, "hf").items() if not k.startswith("classifier")}
    assert_equal(weights.to_native(base), {key: value for key, value in state.items() if not key.startswith("head.")})


def test_authors_sparse_kernels_become_dense_convolutions():
    state = net(num_classes=0).state_dict()
    sparse = sparse_layout(state)
    assert sparse["encoder.stages.0.0.dwconv.kernel"].shape == (49, 8) and sparse["encoder.stages.0.0.dwconv.bias"].shape == (1, 8)
    assert sparse["encoder.downsample_layers.1.1.kernel"].shape == (4, 8, 16)
    assert weights.detect_layout(sparse) == "sparse"
    assert_equal(weights.to_native(sparse), state)
    decoder = {
        "mask_token": torch.zeros(1, 4, 1, 1),
        "proj.weight": torch.zeros(4, 64, 1, 1),
        "decoder.0.dwconv.weight": torch.ones(4, 1, 7, 7),
    }
    assert_equal(weights.to_native(sparse | decoder), state)


def test_the_released_self_supervised_files_are_read():
    state = net(num_classes=0).state_dict()
    released = {key: value.reshape(1, -1) if ".grn." in key else value for key, value in state.items()}
    assert_equal(weights.to_native(released), state)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod."])
@pytest.mark.parametrize("layout", WRITTEN)
def test_prefixes_of_wrapped_models_are_removed(layout, prefix):
    state = net().state_dict()
    wrapped = {prefix + key: value for key, value in weights.from_native(state, layout).items()}
    assert_equal(weights.to_native(wrapped), state)


def test_an_fcmae_gives_its_encoder_and_says_what_was_left_out():
    mae = FCMAE(net(num_classes=0), decoder_embed_dim=16)
    state = mae.state_dict()
    assert_equal(weights.to_native(state), mae.encoder.state_dict())
    decoder = [key for key in state if not key.startswith("encoder.")]
    assert f"{len(decoder)} tensors of the pre-training decoder are left out" in weights.describe(state)
    assert "no head" in weights.describe(state)


@pytest.mark.parametrize("layout", WRITTEN)
def test_a_file_is_described_by_its_layout_and_model(layout):
    with torch.device("meta"):
        state = MODELS["convnextv2_pico"](num_classes=7).state_dict()
    words = weights.describe(weights.from_native(state, layout))
    assert "convnextv2_pico" in words and "7 classes" in words and ("native" if layout == "authors" else layout) in words


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: {}, "0 tensors"),
        (lambda s: {"conv1.weight": torch.zeros(1)}, "conv1.weight"),
        (lambda s: s | {"neck.convs.0.weight": torch.zeros(1), "rpn_head.fc.bias": torch.zeros(1)}, "detector"),
        (lambda s: {f"backbone.{k}": v for k, v in s.items()} | {"backbone.norm0.weight": torch.zeros(1)}, "detector"),
        (lambda s: {f"backbone.body.{k}": v for k, v in s.items()}, "detector"),
        (lambda s: s | {"stages.0.0.attn.weight": torch.zeros(1)}, "stages.0.0.attn.weight"),
        (lambda s: s | {"module.head.bias": torch.zeros(5)}, "head.bias"),
        (lambda s: sparse_layout(s) | {"encoder.stages.0.0.dwconv.kernel": torch.zeros(48, 8)}, "(48, 8)"),
    ],
)
def test_foreign_tensors_are_named(change, words):
    assert_user_error(words, weights.to_native, change(net(num_classes=0).state_dict() | {"head.bias": torch.zeros(5)}))


def test_only_native_tensors_are_written_and_only_to_known_layouts():
    state = net().state_dict()
    assert_user_error("'torchvision'", weights.from_native, state, "torchvision")
    assert_user_error("extra", weights.from_native, state | {"extra": torch.zeros(1)}, "timm")


# --- loading into a model ---------------------------------------------------------------------------------------------


def test_a_head_for_other_classes_is_left_out_and_said():
    state, model = net().state_dict(), net(1, num_classes=7)
    initial = {key: value.clone() for key, value in model.state_dict().items()}
    report = " ".join(weights.load_weights(model, state))
    assert "5 classes in the file, 7 in the model" in report and "initial values: head.weight, head.bias" in report
    assert_equal(model.state_dict(), state | {key: initial[key] for key in ("head.weight", "head.bias")})


@pytest.mark.parametrize(
    ("fresh", "kept"), [(("norm.", "head."), "norm.weight, norm.bias, head.weight"), (("head.",), ": head.weight")]
)
def test_parts_that_an_encoders_file_lacks_stay_initial_and_are_said(fresh, kept):
    model = net(1)
    initial = {key: value.clone() for key, value in model.state_dict().items()}
    encoder = {key: value for key, value in net().state_dict().items() if not key.startswith(fresh)}
    assert kept in " ".join(weights.load_weights(model, encoder))
    assert_equal(model.state_dict(), {key: encoder.get(key, value) for key, value in initial.items()})


def test_a_model_without_classes_leaves_out_norm_and_head_and_says_so():
    state, model = net().state_dict(), net(1, num_classes=0)
    assert "left out norm.weight, norm.bias, head.weight, head.bias" in " ".join(weights.load_weights(model, state))
    assert_equal(model.state_dict(), {key: state[key] for key in model.state_dict()})


@pytest.mark.parametrize(("old", "new"), [(3, 1), (3, 2), (3, 4), (3, 6), (1, 3), (4, 3)])
def test_an_adapted_stem_responds_equally_to_grey_images(old, new):
    source, model = net(in_chans=old).double(), net(1, in_chans=new).double()
    report = weights.load_weights(model, source.state_dict())
    assert f"stem adapted from {old} to {new} input channels" in report
    grey = torch.randn(2, 1, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(model(grey.expand(-1, new, -1, -1)), source(grey.expand(-1, old, -1, -1)))
    kernel = source.state_dict()[weights.STEM]
    if new == 1:
        torch.testing.assert_close(model.state_dict()[weights.STEM], kernel.sum(dim=1, keepdim=True))
    if new == 6:
        torch.testing.assert_close(model.state_dict()[weights.STEM], torch.cat([kernel, kernel], dim=1) / 2)


def without(state: dict, *names: str) -> dict:
    return {key: value for key, value in state.items() if key not in names}


@pytest.mark.parametrize(
    ("native", "words"),
    [
        (lambda s: without(s, "stages.2.1.grn.gamma"), "1 missing: stages.2.1.grn.gamma"),
        (lambda s: without(s, "norm.weight", "norm.bias"), "2 missing: norm.weight, norm.bias"),
        (lambda s: without(s, "norm.bias", "head.weight", "head.bias"), "1 missing: norm.bias"),
        (lambda s: without(s, "head.weight"), "1 missing: head.weight"),
        (lambda s: without(s, "stages.1.0.dwconv.weight"), "stages.1.0.dwconv.weight"),
        (lambda s: s | {"mask_token": torch.zeros(1)}, "1 unexpected: mask_token"),
        (lambda s: s | {"norm.weight": torch.zeros(3)}, "1 misshaped: norm.weight (3,) for (64,)"),
        (lambda s: s | {weights.STEM: torch.zeros(8, 3, 7, 7)}, "(8, 3, 7, 7)"),
        (lambda s: net(stem_stride=2).state_dict(), "--stem_stride 2"),
        (lambda s: net(dims=(8, 16, 32, 72)).state_dict(), "dims (8, 16, 32, 72)"),
        (lambda s: net(depths=(1, 1, 1, 1)).state_dict(), "10 missing: stages.2.1.dwconv.weight"),
    ],
)
def test_loading_is_strict_and_names_what_does_not_fit(native, words):
    model = net(1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert_user_error(words, weights.load_weights, model, native(net().state_dict()))
    assert_equal(model.state_dict(), before)


def test_grn_never_stays_zero_in_silence():
    v1, v2 = net(version=1).state_dict(), net().state_dict()
    assert_user_error("10 missing: stages.0.0.grn.gamma", weights.load_weights, net(1), v1)
    assert_user_error("10 unexpected: stages.0.0.grn.gamma", weights.load_weights, net(1, version=1), v2)
    with torch.device("meta"):
        v1, model = MODELS["convnext_atto"]().state_dict(), MODELS["convnextv2_atto"]()
    assert_user_error("the weights are of convnext_atto, the model is convnextv2_atto", weights.load_weights, model, v1)


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top", [None, "model", "state_dict", "module"])
def test_state_dicts_are_found_under_the_usual_keys(tmp_path, top):
    state = net().state_dict()
    torch.save({top: state, "epoch": 3} if top else state, tmp_path / "a.pth")
    assert_equal(weights.read_file(tmp_path / "a.pth"), state)


def test_averaged_weights_are_read_when_asked_for(tmp_path):
    raw, averaged = net(0).state_dict(), net(1).state_dict()
    torch.save({"model": raw, "model_ema": averaged, "optimizer": {}}, tmp_path / "a.pth")
    assert_equal(weights.read_file(tmp_path / "a.pth"), raw)
    assert_equal(weights.read_file(tmp_path / "a.pth", ema=True), averaged)
    torch.save({"model": raw}, tmp_path / "b.pth")
    assert_user_error("model_ema", lambda: weights.read_file(tmp_path / "b.pth", ema=True))


def test_the_authors_own_checkpoints_are_read_in_spite_of_their_namespace(tmp_path):
    state = net().state_dict()
    torch.save({"model": state, "args": argparse.Namespace(model="convnextv2_atto", lr=1e-3)}, tmp_path / "a.pth")
    assert_equal(weights.read_file(tmp_path / "a.pth"), state)


def test_files_without_weights_are_named_and_no_code_runs(tmp_path):
    whole = net().state_dict()
    weights.write_file(tmp_path / "whole.pth", whole, "model")
    contents = {"code": {"model": whole, "x": Code()}, "list": list(whole.values()), "optimizer": {"optimizer": {"state": {}}, "epoch": 1},
                "empty": {}, "nothing": {"model": {}}, "mixed": whole | {"epoch": 1}}  # fmt: skip
    for name, content in contents.items():
        torch.save(content, tmp_path / name)
    (tmp_path / "text").write_text("hello")
    (tmp_path / "truncated").write_bytes((tmp_path / "whole.pth").read_bytes()[:5000])
    for name in (*contents, "text", "truncated", "missing", "."):
        assert_user_error(str(tmp_path / name), weights.read_file, tmp_path / name)


def test_safetensors_are_written_read_and_refused_when_damaged(tmp_path):
    pytest.importorskip("safetensors")
    state, path = net().state_dict(), tmp_path / "a.safetensors"
    for layout in WRITTEN:
        weights.write_file(path, weights.from_native(state, layout))
        read = weights.to_native(weights.read_file(path))
        assert_equal({key: read[key] for key in state}, state)
        assert len(read) == len(state)
    path.write_bytes(path.read_bytes()[:-100])
    (tmp_path / "text.safetensors").write_text("hello")
    for name in ("a", "text", "missing"):
        assert_user_error(f"{name}.safetensors", weights.read_file, tmp_path / f"{name}.safetensors")


def test_without_the_safetensors_package_one_line_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert_user_error("pip install safetensors", weights.read_file, tmp_path / "a.safetensors")
    assert_user_error("pip install safetensors", weights.write_file, tmp_path / "a.safetensors", net().state_dict())


# --- command line -----------------------------------------------------------------------------------------------------


def convert(source: Path, target: Path, *flags: str):
    weights.main(weights.get_args([str(source), str(target), *flags]))


@pytest.mark.parametrize("layout", ["native", *WRITTEN])
def test_the_command_converts_there_and_back(tmp_path, capsys, layout):
    state = net().state_dict()
    torch.save({"model": state}, tmp_path / "a.pth")
    convert(tmp_path / "a.pth", tmp_path / "b.bin", "--to", layout)
    convert(tmp_path / "b.bin", tmp_path / "c.pt", "--to", "native")
    assert_equal(torch.load(tmp_path / "c.pt")["model"], state)
    out = capsys.readouterr().out
    assert "native layout, 70 tensors, convnextv2 of depths (1, 1, 2, 1)" in out and f"{layout} layout, 70 tensors" in out


def test_the_command_takes_averaged_weights_and_drops_the_decoder(tmp_path, capsys):
    mae, averaged = FCMAE(net(num_classes=0), decoder_embed_dim=16).state_dict(), net(1).state_dict()
    torch.save({"model": mae, "model_ema": averaged}, tmp_path / "a.pth")
    convert(tmp_path / "a.pth", tmp_path / "b.pth", "--to", "authors", "--model_ema")
    assert_equal(torch.load(tmp_path / "b.pth")["model"], averaged)
    convert(tmp_path / "a.pth", tmp_path / "b.pth", "--to", "timm")
    assert "tensors of the pre-training decoder are left out" in capsys.readouterr().out
    assert_equal(weights.to_native(torch.load(tmp_path / "b.pth")), net(num_classes=0).state_dict())


def test_the_command_refuses_what_it_cannot_do(tmp_path):
    path, state = tmp_path / "a.pth", net().state_dict()
    torch.save({"model": state}, path)
    torch.save({"model": without(state, "norm.bias")}, tmp_path / "incomplete.pth")
    (tmp_path / "link.pth").symlink_to(path)
    before = path.read_bytes()
    assert_user_error("never overwritten", convert, path, path, "--to", "timm")
    assert_user_error("never overwritten", convert, path, tmp_path / "link.pth", "--to", "timm")
    assert_user_error("b.onnx", convert, path, tmp_path / "b.onnx", "--to", "timm")
    assert_user_error("cannot write", convert, path, tmp_path / "nowhere/b.pth", "--to", "timm")
    assert_user_error("cannot read", convert, tmp_path / "missing.pth", tmp_path / "b.pth", "--to", "timm")
    assert_user_error("norm.bias", convert, tmp_path / "incomplete.pth", tmp_path / "b.pth", "--to", "timm")
    assert path.read_bytes() == before
    assert {file.name for file in tmp_path.iterdir()} == {"a.pth", "incomplete.pth", "link.pth"}
