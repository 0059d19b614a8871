"""Claims about GRN's alternatives, other decoders, and the benchmarks, of which no time is ever asserted."""

import importlib
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import CPU, TINY, assert_equal, image_folder, randomised, read_table, run, words
from test_sparse import check_against_masked, make_images, make_mask, make_net
from torchvision.ops import SqueezeExcitation

import analyze
import finetune
import pretrain
import weights
from experiments import bench, worth
from experiments.decoders import DECODERS, Positions, TransformerBlock, UNet, make_decoder
from experiments.norms import MLP_NORMS, replace_norm
from fast import FastBlock
from fcmae import FCMAE
from model import SIZES, ConvNeXt
from plumbing.files import UserError
from sparse import masked_stages, sparse_stages

# --- GRN's alternatives -----------------------------------------------------------------------------------------------

C = 32


def make_norm(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    norm = randomised(MLP_NORMS[name](C).double())
    return norm.get_submodule(name)


def make_features() -> torch.Tensor:
    return torch.randn(3, 4, 5, C, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("name", MLP_NORMS)
def test_encoding_and_every_gradient_equal_the_masked_oracles_and_the_dense_networks(name):
    net = randomised(replace_norm(make_net(), name).double(), 3)
    imgs = make_images(net)
    check_against_masked(net, imgs, make_mask("equal"), "sparse")
    stages = sparse_stages(net, imgs, make_mask("all visible"))
    torch.testing.assert_close(stages[-1].dense(), net.forward_stages(imgs)[-1])
    for encode in () if name == "grn" else (sparse_stages, masked_stages):
        with pytest.raises(ValueError, match="unequal numbers of sites visible"):
            encode(net, imgs, make_mask("unequal"))


FORMULAS = {  # G of a map, and N of the channels' G
    "grn_l1": (lambda m: m.abs().sum(), lambda g: g / g.mean()),
    "grn_average": (lambda m: m.mean(), lambda g: g / g.abs().mean()),
    "grn_standardise": (lambda m: m.norm(), lambda g: (g - g.mean()) / g.std(correction=0)),
    "grn_inverse": (lambda m: m.norm(), lambda g: 1 / g.mean()),
    "grn_no_skip": (lambda m: m.norm(), lambda g: g / g.mean()),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_grns_relatives_are_the_papers_formulas_and_start_as_the_identity(name):
    x, layer, (aggregate, normalise), skip = make_features(), make_norm(name), FORMULAS[name], name != "grn_no_skip"
    for image, y in zip(x, layer(x)):  # (H, W, C)
        g = torch.stack([aggregate(channel) for channel in image.unbind(-1)])
        expected = layer.gamma[0, 0] * image * normalise(g) + layer.beta[0, 0] + skip * image
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)  # GRN's eps of 1e-6 is not in these formulas
    assert torch.equal(MLP_NORMS[name](C).double()(x), x) == skip


def test_other_norms_and_squeeze_and_excitation_equal_torchs():
    x, theirs = make_features(), SqueezeExcitation(C, C // 16).double()
    first = x.permute(0, 3, 1, 2)  # (N, C, H, W)
    bn, ln, lrn, se = (make_norm(name) for name in ("bn", "ln", "lrn", "se"))
    theirs.load_state_dict({key: value.view_as(theirs.get_parameter(key)) for key, value in se.state_dict().items()})
    expected = {
        bn: F.batch_norm(first, None, None, bn.weight, bn.bias, training=True),
        ln: F.layer_norm(x, (C,), ln.weight, ln.bias, 1e-6).permute(0, 3, 1, 2),
        lrn: F.local_response_norm(first, 5, 1e-4, 0.75, 2.0) * lrn.gamma.view(-1, 1, 1) + lrn.beta.view(-1, 1, 1),
        se: theirs(first),
    }
    for layer, y in expected.items():
        torch.testing.assert_close(layer(x), y.permute(0, 2, 3, 1))


def test_cbam_gates_channels_then_sites_by_mean_and_maximum():
    x, cbam = make_features(), make_norm("cbam")
    pooled = x.mean((1, 2), keepdim=True), x.amax((1, 2), keepdim=True)
    gated = x * torch.sigmoid(sum(cbam.fc2(cbam.fc1(values).relu()) for values in pooled))
    (a, b), bias = cbam.site.weight[0], cbam.site.bias
    sites = a * gated.mean(-1, keepdim=True) + b * gated.amax(-1, keepdim=True) + bias
    torch.testing.assert_close(cbam(x), gated * sites.sigmoid())


@pytest.mark.parametrize(("name", "millions"), [("se", 109), ("cbam", 109), ("none", 89), ("ln", 89), ("grn", 89)])
def test_base_models_have_the_papers_millions_of_parameters_and_initial_weights(name, millions):
    with torch.device("meta"):
        net = replace_norm(ConvNeXt(*SIZES["base"]), name)
    assert round(sum(p.numel() for p in net.parameters()) / 1e6) == pytest.approx(millions, abs=1)
    modules = replace_norm(ConvNeXt(**TINY), name).stages[3][0].grn.modules()
    linears = [layer for layer in modules if isinstance(layer, torch.nn.Linear) and layer.weight.numel() > 100]
    assert len(linears) == 2 * (millions == 109)
    assert all(not layer.bias.any() and 0.01 < layer.weight.std() < 0.03 for layer in linears)


def make_classifier(name: str, seed: int = 0) -> ConvNeXt:
    torch.manual_seed(seed)
    return randomised(replace_norm(ConvNeXt(**TINY, stem_stride=1, num_classes=3), name), seed)


@pytest.mark.parametrize(("name", "other"), [*pairwise([*MLP_NORMS, "grn"])])
def test_weights_are_known_by_their_norm_and_load_into_no_other_unasked(name, other):
    source, imgs = make_classifier(name).eval(), torch.randn(2, 3, 16, 16)
    native = weights.to_native({f"module.{key}": value for key, value in source.state_dict().items()})
    assert weights.mlp_norm_of(native) == name
    assert torch.equal(weights.build(native).eval()(imgs), source(imgs))
    model = make_classifier(other, seed=1)
    with pytest.raises(UserError, match="do not fit"):
        weights.load_weights(model, native)
    expected = {k: v.clone() if ".grn." in k else native[k] for k, v in model.state_dict().items()}
    weights.load_weights(model, native, other_norm=True)
    assert_equal(model.state_dict(), expected)
    if name != "grn":
        with pytest.raises(UserError, match=name):
            weights.from_native(native, "timm")


# --- decoders ---------------------------------------------------------------------------------------------------------


def make_autoencoder(decoder: str, stem_stride: int = 1, **options) -> FCMAE:
    torch.manual_seed(0)
    encoder = ConvNeXt(**TINY, num_classes=0, stem_stride=stem_stride)
    return make_decoder(decoder, encoder, **dict(decoder_embed_dim=32) | options)


@pytest.mark.parametrize(("stem_stride", "backend"), [(1, "sparse"), (2, "leaky")])
@pytest.mark.parametrize("decoder", DECODERS)
def test_every_decoder_predicts_every_patch_and_starts_near_a_loss_of_one(decoder, stem_stride, backend):
    mae = make_autoencoder(decoder, stem_stride, backend=backend)
    loss, pred, mask = mae(torch.rand(2, 3, 32, 48))
    assert pred.shape == (2, mask[0].numel(), mae.patch_size**2 * 3) and 0.9 < loss < 1.15


def test_the_u_net_with_skips_takes_finer_maps_and_depends_on_each():
    imgs, mask = torch.randn(1, 3, 16, 24), torch.tensor([[[True, False, True], [False, True, True]]])
    maps, masked = (make_autoencoder("unet_skip", backend=b).forward_encoder(imgs, mask) for b in ("sparse", "masked"))
    torch.testing.assert_close(maps, masked)
    assert [tuple(x.shape) for x in maps] == [(1, 8, 16, 24), (1, 16, 8, 12), (1, 32, 4, 6), (1, 64, 2, 3)]
    net = randomised(UNet(64, 1, TINY["dims"]))
    for k in range(3):
        changed = [finer + (i == k) for i, finer in enumerate(maps[:3])]
        assert not torch.allclose(net(maps[3], maps[:3]), net(maps[3], changed))


def test_the_u_net_draws_its_pixels_where_they_belong():
    mae = make_autoencoder("unet")
    with torch.no_grad():
        for parameter in (*mae.decoder.parameters(), mae.pred.weight):
            parameter.zero_()
        mae.pred.bias.copy_(torch.tensor([1.0, 2.0, 3.0]))
    pred = mae(torch.randn(1, 3, 16, 16))[1]
    assert torch.equal(mae.unpatchify(pred, 2, 2)[0, :, 5, 9], torch.tensor([1.0, 2.0, 3.0]))


def test_the_transformers_block_normalises_first_and_its_positions_differ():
    with pytest.raises(ValueError, match="20 is not a multiple of 16"):
        make_autoencoder("transformer", decoder_embed_dim=20)
    block, x = randomised(TransformerBlock(32)).eval(), torch.randn(2, 32, 3, 5)
    tokens = x.flatten(2).transpose(1, 2)
    y = F.layer_norm(tokens, (32,), block.norm1.weight, block.norm1.bias, 1e-6)
    tokens = tokens + block.self_attn(y, y, y)[0]
    y = F.layer_norm(tokens, (32,), block.norm2.weight, block.norm2.bias, 1e-6)
    tokens = tokens + block.linear2(F.gelu(block.linear1(y)))
    torch.testing.assert_close(block(x), tokens.transpose(1, 2).view(x.shape), rtol=1e-4, atol=1e-5)
    positions = Positions()(torch.zeros(1, 32, 5, 7)).flatten(2)[0].T  # (35, 32)
    assert (torch.cdist(positions, positions) + torch.eye(35)).min() > 0.1


def test_scripts_train_alternatives_keep_them_unless_asked_and_look_at_them(tmp_path, small_models):
    folder = image_folder(tmp_path / "images", ("stripes", "rings"), train=8, val=2)
    for name, decoder in (("grn", "transformer"), ("none", "unet"), ("bn", "unet_skip")):
        run(pretrain, folder, tmp_path / name, epochs=1, mlp_norm=name, decoder=decoder, decoder_depth=2)
        for command in ("reconstruct", "collapse"):
            options = words(checkpoint=tmp_path / name / "checkpoint-1.pth", output_dir=tmp_path / name, num_images=2)
            analyze.main(analyze.get_args([command, *options]))
    for before, asked in (("grn", None), ("bn", None), ("grn", "none"), ("none", "grn")):
        output, encoder = tmp_path / f"{before}-{asked}", tmp_path / before / "encoder.pth"
        state = run(finetune, folder, output, epochs=1, finetune=encoder, mlp_norm=asked)
        assert weights.mlp_norm_of(weights.to_native(state["model"])) == asked or before


# --- benchmarks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("task", "count"), [("encoder", 4), ("step", 3), ("finetune", 1)])
def test_every_task_writes_a_row_for_each_candidate(task, count, tmp_path, monkeypatch, small_models):
    monkeypatch.setattr(bench, "timm", None)
    flags = dict(model="convnextv2_atto", batch_size=2, input_size=64, amp="none", repeats=1, device="cpu")
    bench.main(bench.get_args([task, *words(**flags, output_dir=tmp_path)]))
    rows = read_table(tmp_path / f"{task}.csv")
    assert len(rows) == count and all(float(row["ms"]) > 0 for row in rows)
    assert (tmp_path / f"{task}.png").exists() == (task == "encoder")


def test_candidates_are_networks_as_the_scripts_train_them_or_plain():
    for plain in (False, True):
        net = bench.prepare(bench.get_args(["--plain", str(plain)]), CPU, make_net())
        assert net.training and (type(net.stages[0][0]) is FastBlock) != plain


def test_times_are_medians_and_memory_counts_a_storage_once(monkeypatch):
    times = iter([0, 1, 0, 1, 0, 1, 0, 1, 0, 10])  # two of warm-up; rounds of 1, 1 and 10
    with monkeypatch.context() as patch:
        patch.setattr(bench.time, "perf_counter", lambda: next(times))
        assert bench.interleaved({"a": lambda: None}, 3, CPU) == {"a": 1}
    x = torch.randn(1024, 256, requires_grad=True)
    assert bench.memory(lambda: (x * x).sum().backward(), CPU) == pytest.approx(1)


# --- is pre-training worth it? ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("given", "minutes", "seeds"), [(False, 1.25, 1), (True, 4.0, 2)])
def test_the_comparison_runs_each_job_once(tmp_path, monkeypatch, capsys, small_models, given, minutes, seeds):
    folder, commands = image_folder(tmp_path / "images", train=12, val=6), []

    def in_this_process(command, stdout, stderr):
        commands.append(command)
        script, output = importlib.import_module(Path(command[1]).stem), Path(command[-1])
        script.main(script.get_args(command[2:]))
        if "trial" in output.name:  # as on a slow machine, whatever this one is
            (output / "log.jsonl").write_text('{"seconds": 5.0}')
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(worth.subprocess, "run", in_this_process)
    monkeypatch.setattr(worth, "time", SimpleNamespace(time=lambda: 10 * len(commands)))  # seconds for each job
    monkeypatch.setattr(worth, "LEAST", 3)
    start = ConvNeXt((1, 1, 1, 1), (8, 8, 16, 16), num_classes=0, stem_stride=1)
    torch.save(start.state_dict(), tmp_path / "a.pth")
    flags = words(data_path=folder, output_dir=tmp_path / "worth", minutes=minutes)
    flags += words(init_weight=tmp_path / "a.pth") if given else []
    flags += ["--flags", *words(input_size=16, num_workers=0, stem_stride=1)]
    for _ in range(2):  # the second time has nothing to do
        worth.main(worth.get_args(flags))
        assert len(commands) == 4 + seeds * (2 + given)
    with pytest.raises(UserError, match="choose another --output_dir"):
        worth.main(worth.get_args([*flags, "--layer_decay=0.9"]))
    rows = read_table(tmp_path / "worth" / "worth.csv")
    starts = ["random", *["published"] * given, "pre-trained"]
    assert [(row["start"], row["seeds"]) for row in rows] == [(start, str(seeds)) for start in starts]
    for start, row in zip(starts, rows):
        folders = [tmp_path / "worth" / f"{start}-{k}" for k in range(seeds)]
        config = [weights.read_config(folder / "checkpoint-3.pth") for folder in folders]
        assert [(c["seed"], c["epochs"]) for c in config] == [(seed, 3) for seed in range(seeds)]
        source = dict(random=None, published=tmp_path / "a.pth").get(start, tmp_path / "worth/pretrain/encoder.pth")
        assert {c["finetune"] for c in config} == {source and str(source)}
        best = [torch.load(folder / "checkpoint-best.pth")["top1"] for folder in folders]
        assert float(row["top1"]) == pytest.approx(sum(best) / seeds, abs=1e-3)
        assert float(row["minutes"]) == pytest.approx((10 + 10 * (start == "pre-trained")) / 60, rel=1e-4)
    assert "minutes of pre-training brought" in capsys.readouterr().out


VERDICTS = [  # top-1 from weights pre-trained here and from published ones, by seed; the sentence begins so
    ([50, 52], [40, 42], "Pre-train on these images: 7.0 minutes of pre-training brought +10.0 points over published"),
    ([30, 32], [40, 42], "Fine-tune from published weights"),
    ([40, 50], [40, 48], "Not decided"),
    ([60], [40], "Not decided: 7.0 minutes of pre-training brought +20.0 points over published weights (twice the"),
]


@pytest.mark.parametrize(("here", "published", "words"), VERDICTS)
def test_the_verdict_weighs_the_gain_against_the_spread_of_the_seeds(here, published, words):
    top1 = {"random": [10] * len(here), "published": published, "pre-trained": here}
    assert worth.verdict(top1, 7).startswith(words)


# Of a trial of ten seconds: the budget, the seconds of the trial's epoch in the log, and the epochs that fit.
@pytest.mark.parametrize(("budget", "epoch", "count"), [(5, 4, 1), (10, 4, 1), (14, 4, 2), (26, 4, 5), (11, 0.0, 11)])
def test_epochs_fit_into_the_time_by_the_trial(tmp_path, monkeypatch, budget, epoch, count):
    (tmp_path / "log.jsonl").write_text(f'{{"seconds": {epoch}}}')
    monkeypatch.setattr(worth, "run_job", lambda *_: 10.0)
    assert worth.fitting_epochs(budget, tmp_path, "x.py") == count


def test_a_job_that_fails_is_named_and_its_time_counts_when_it_continues(tmp_path, monkeypatch):
    status, clock = iter([1, 0]), iter([0, 5, 10, 12])

    def ended(command, stdout, stderr):
        stdout.write("the reason\n")
        return SimpleNamespace(returncode=next(status))

    monkeypatch.setattr(worth.subprocess, "run", ended)
    monkeypatch.setattr(worth, "time", SimpleNamespace(time=lambda: next(clock)))
    with pytest.raises(UserError, match="job failed: the reason"):
        worth.run_job(tmp_path / "job", "out", "x.py")
    assert worth.run_job(tmp_path / "job", "out", "x.py") == 7
