"""Claims about ablations and the flags that choose among them."""

import pytest
import torch
import torch.nn.functional as F
from helpers import TINY, picture_folder, randomised, run, words
from test_sparse import check_against_masked, images_for, network, some_mask
from torchvision.ops import SqueezeExcitation

import analyze
import finetune
import pretrain
import weights
from ablations.decoders import DECODERS, Positions
from ablations.norms import MLP_NORMS, exchange_norm
from fcmae import FCMAE
from model import SIZES, ConvNeXt
from plumbing.script import UserError
from sparse import masked_stages, sparse_stages

C = 32


def module(name: str, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return randomised(MLP_NORMS[name](C).double(), seed)


def exchange(net: ConvNeXt, name: str) -> ConvNeXt:
    return randomised(exchange_norm(net, name).double(), 3)


def features(seed: int = 0) -> torch.Tensor:
    return torch.randn(3, 4, 5, C, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- what stands in GRN's place


@pytest.mark.parametrize("backend", ["sparse", "reference"])
@pytest.mark.parametrize("name", MLP_NORMS)
def test_encoding_and_every_gradient_equal_the_masked_oracles(name, backend):
    net = exchange(network(), name)
    check_against_masked(net, images_for(net), some_mask("equal"), backend)


@pytest.mark.parametrize("name", MLP_NORMS)
def test_all_visible_sites_give_the_dense_networks_features(name):
    net = exchange(network(), name)
    imgs = images_for(net)
    torch.testing.assert_close(sparse_stages(net, imgs, some_mask("all visible"))[-1].dense(), net.forward_stages(imgs)[-1])


@pytest.mark.parametrize("encode", [sparse_stages, masked_stages])
def test_unequal_masks_are_refused_where_pooling_would_need_more(encode):
    net = exchange(network(), "se")
    with pytest.raises(ValueError, match="unequal"):
        encode(net, images_for(net), some_mask("unequal"))


@pytest.mark.parametrize(
    ("name", "aggregate", "normalise", "skip"),
    [
        ("grn_l1", lambda m: m.abs().sum(), lambda g, all_g: g / all_g.mean(), 1),
        ("grn_average", lambda m: m.mean(), lambda g, all_g: g / all_g.abs().mean(), 1),
        ("grn_standardise", lambda m: m.norm(), lambda g, all_g: (g - all_g.mean()) / all_g.var(correction=0).sqrt(), 1),
        ("grn_inverse", lambda m: m.norm(), lambda g, all_g: 1 / all_g.mean(), 1),
        ("grn_no_skip", lambda m: m.norm(), lambda g, all_g: g / all_g.mean(), 0),
    ],
)
def test_grns_relatives_are_the_papers_formulas(name, aggregate, normalise, skip):
    x, layer = features(), module(name)
    inner = layer.get_submodule(name)
    expected = torch.empty_like(x)
    for n in range(len(x)):
        g = torch.stack([aggregate(x[n, :, :, c]) for c in range(C)])
        for c in range(C):
            gamma, beta = inner.gamma[0, 0, 0, c], inner.beta[0, 0, 0, c]
            expected[n, :, :, c] = gamma * x[n, :, :, c] * normalise(g[c], g) + beta + skip * x[n, :, :, c]
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)  # GRN's eps of 1e-6 is not in these formulas


def test_the_other_norms_equal_torchs_on_channels_first_maps():
    x = features()
    first = x.permute(0, 3, 1, 2)  # (N, C, H, W)
    bn, ln, lrn = module("bn").bn, module("ln").ln, module("lrn").lrn
    for layer, expected in (
        (bn, F.batch_norm(first, None, None, bn.weight, bn.bias, training=True)),
        (ln, (first - first.mean(1, keepdim=True)) / (first.var(1, correction=0, keepdim=True) + 1e-6).sqrt() * ln.weight.view(-1, 1, 1) + ln.bias.view(-1, 1, 1)),
        (lrn, F.local_response_norm(first, 5, 1e-4, 0.75, 2.0) * lrn.gamma.view(-1, 1, 1) + lrn.beta.view(-1, 1, 1)),
    ):  # fmt: skip
        torch.testing.assert_close(layer(x), expected.permute(0, 2, 3, 1))


def test_squeeze_and_excitation_equals_torchvisions():
    x, ours, theirs = features(), module("se"), SqueezeExcitation(C, C // 16).double()
    for k in ("fc1", "fc2"):
        source = ours.se.get_submodule(k)
        theirs.get_submodule(k).load_state_dict({"weight": source.weight.data[:, :, None, None], "bias": source.bias.data})
    torch.testing.assert_close(ours(x), theirs(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


def test_cbam_weighs_channels_then_sites_by_mean_and_maximum():
    x, cbam = features(), module("cbam").cbam
    for n in range(len(x)):
        mlp = [cbam.fc2(cbam.fc1(pooled).relu()) for pooled in (x[n].mean((0, 1)), x[n].flatten(0, 1).max(dim=0).values)]
        weighed = x[n] * torch.sigmoid(mlp[0] + mlp[1])
        (a, b), bias = cbam.site.weight[0], cbam.site.bias
        for i in range(4):
            for j in range(5):
                site = weighed[i, j]
                expected = site * torch.sigmoid(a * site.mean() + b * site.max() + bias)
                torch.testing.assert_close(cbam(x)[n, i, j], expected)


@pytest.mark.parametrize(("name", "millions"), [("se", 109), ("cbam", 109), ("none", 89), ("ln", 89), ("grn", 89)])
def test_base_models_have_the_papers_millions_of_parameters(name, millions):
    with torch.device("meta"):
        net = exchange_norm(ConvNeXt(*SIZES["base"]), name)
    assert round(sum(p.numel() for p in net.parameters()) / 1e6) == pytest.approx(millions, abs=1)


@pytest.mark.parametrize("name", ["grn", "none", "grn_l1", "grn_average", "grn_standardise", "grn_inverse"])
def test_with_a_skip_they_start_as_the_identity(name):
    x = features()
    assert torch.equal(MLP_NORMS[name](C).double()(x), x)


def test_v1_takes_nothing_in_grns_place():
    with pytest.raises(ValueError, match="ln takes GRN's place, and ConvNeXt V1 has none"):
        exchange_norm(ConvNeXt(**TINY, version=1), "ln")


# --- their weights


def tiny(name: str | None = None, seed: int = 0, num_classes: int = 3) -> ConvNeXt:
    torch.manual_seed(seed)
    net = ConvNeXt(**TINY, stem_stride=1, num_classes=num_classes)
    return randomised(exchange_norm(net, name) if name else net, seed)


@pytest.mark.parametrize("name", MLP_NORMS)
def test_weights_tell_what_stands_in_grns_place(name):
    source = tiny(name)
    native = weights.to_native({f"module.{key}": value for key, value in source.state_dict().items()})
    assert weights.mlp_norm_of(native) == name
    copy = weights.build(native)
    imgs = torch.randn(2, 3, 16, 16)
    assert torch.equal(copy.eval()(imgs), source.eval()(imgs))


def test_no_two_variants_exchange_weights_in_silence():
    states = {name: tiny(name).state_dict() for name in MLP_NORMS}
    for name in MLP_NORMS:
        for other in MLP_NORMS:
            if other != name:
                with pytest.raises(UserError, match="do not fit"):
                    weights.load_weights(tiny(name), weights.to_native(states[other]))


@pytest.mark.parametrize(("before", "after"), [("grn", "none"), ("none", "grn"), ("grn", "se")])
def test_an_exchange_that_was_asked_for_keeps_all_else_and_is_said(before, after):
    source, model, fresh = tiny(before), tiny(after, seed=1), tiny(after, seed=1).state_dict()
    report = weights.load_weights(model, source.state_dict(), exchange_mlp_norm=True)
    assert any(f"{before} exchanged for {after}" in line for line in report)
    for key, value in model.state_dict().items():
        assert torch.equal(value, fresh[key] if ".grn." in key else source.state_dict()[key])


def test_other_libraries_have_no_variants():
    with pytest.raises(UserError, match="timm has no ConvNeXt with se"):
        weights.from_native(tiny("se").state_dict(), "timm")


# --- decoders


def autoencoder(decoder: str, **kwargs) -> FCMAE:
    torch.manual_seed(0)
    stem = kwargs.pop("stem_stride", 1)
    encoder = ConvNeXt(**TINY, num_classes=0, stem_stride=stem)
    return DECODERS[decoder](encoder, decoder_embed_dim=32, **kwargs)


@pytest.mark.parametrize("stem_stride", [1, 2])
@pytest.mark.parametrize("decoder", DECODERS)
def test_every_decoder_predicts_every_patch_and_starts_near_a_loss_of_one(decoder, stem_stride):
    mae = autoencoder(decoder, stem_stride=stem_stride)
    loss, pred, mask = mae(torch.rand(2, 3, 32, 48))
    assert pred.shape == (2, mask[0].numel(), mae.patch_size**2 * 3) and 0.9 < loss < 1.15
    loss.backward()
    assert all(p.grad is not None for name, p in mae.named_parameters() if not name.startswith("encoder."))


@pytest.mark.parametrize("backend", ["masked", "reference"])
@pytest.mark.parametrize("decoder", DECODERS)
def test_sparse_and_masked_encoders_give_every_decoder_the_same(decoder, backend):
    imgs = torch.randn(2, 3, 16, 24, dtype=torch.float64)
    mask = torch.tensor([[[True, False, True], [False, True, True]], [[True, True, False], [True, True, False]]])
    maes = [randomised(autoencoder(decoder, backend=name).double()) for name in ("sparse", backend)]
    losses = [mae(imgs, mask)[0] for mae in maes]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    for a, b in zip(*(mae.parameters() for mae in maes)):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("decoder", DECODERS)
def test_hidden_pixels_reach_no_prediction(decoder):
    mae = autoencoder(decoder).eval()
    imgs, mask = torch.randn(1, 3, 16, 24), torch.tensor([[[True, False, True], [False, True, True]]])
    spoiled = imgs.clone()
    spoiled[:, :, :8, :8] = 100.0
    assert torch.equal(mae(imgs, mask)[1], mae(spoiled, mask)[1])


def test_only_the_u_net_with_skips_sees_finer_maps_than_the_last():
    imgs, mask = torch.randn(1, 3, 16, 24), torch.tensor([[[True, False, True], [False, True, True]]])
    used = {}
    for decoder in DECODERS:
        found = autoencoder(decoder).forward_encoder(imgs, mask)
        used[decoder] = [tuple(x.shape) for x in found] if isinstance(found, list) else tuple(found.shape)
    assert used.pop("unet_skip") == [(1, 8, 16, 24), (1, 16, 8, 12), (1, 32, 4, 6), (1, 64, 2, 3)]
    assert set(used.values()) == {(1, 64, 2, 3)}


def test_the_u_net_draws_its_pixels_where_they_belong():
    mae = autoencoder("unet")
    with torch.no_grad():
        for parameter in mae.decoder.parameters():
            parameter.zero_()
        mae.pred.weight.zero_()
        mae.pred.bias.copy_(torch.tensor([1.0, 2.0, 3.0]))
    pred = mae(torch.randn(1, 3, 16, 16))[1]
    assert torch.equal(mae.unpatchify(pred, 2, 2)[0, :, 5, 9], torch.tensor([1.0, 2.0, 3.0]))


def test_the_transformers_positions_tell_every_patch_from_every_other():
    positions = Positions()(torch.zeros(1, 32, 5, 7)).flatten(2)[0].T  # (35, 32)
    assert (torch.cdist(positions, positions) + torch.eye(35)).min() > 0.1


# --- the scripts' flags


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """Two classes, four training images and one validation image each."""
    return picture_folder(tmp_path_factory.mktemp("shapes"), ("stripes", "rings"), train=8, val=2)


def train(script, shapes, output_dir, **more) -> None:
    run(script, shapes, output_dir, **dict(input_size=16, epochs=1) | more)


def test_grn_is_dropped_or_added_at_fine_tuning_when_asked_and_kept_otherwise(shapes, tmp_path, capsys):
    for name in ("grn", "none"):
        train(pretrain, shapes, tmp_path / name, mlp_norm=name)
    for before, asked, after in (("grn", None, "grn"), ("none", None, "none"), ("grn", "none", "none"), ("none", "grn", "grn")):
        output = tmp_path / f"{before}-{asked}"
        capsys.readouterr()
        train(finetune, shapes, output, finetune=tmp_path / before / "encoder.pth", mlp_norm=asked)
        assert (f"{before} exchanged for {after}" in capsys.readouterr().out) == (before != after)
        state = weights.to_native(weights.read_file(output / "checkpoint-1.pth"))
        assert weights.mlp_norm_of(state) == after
        finetune.main(finetune.get_args(words(data_path=shapes, eval=True, resume=output / "checkpoint-1.pth")))
        assert "top-1" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags", [dict(decoder="unet_skip", mlp_norm="bn"), dict(decoder="transformer", mlp_norm="cbam", decoder_depth=2)]
)
def test_a_variants_checkpoint_is_reconstructed_and_measured_by_analyze(shapes, tmp_path, flags):
    train(pretrain, shapes, tmp_path, **dict(decoder_embed_dim=32, mask_ratio=0.5) | flags)
    for command in ("reconstruct", "collapse"):
        options = ["--checkpoint", str(tmp_path / "checkpoint-1.pth"), "--output_dir", str(tmp_path), "--num_images", "2"]
        analyze.main(analyze.get_args([command, *options]))
        assert (tmp_path / f"{command}.csv").exists()
