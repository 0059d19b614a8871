"""Claims about analyze.py: each measure against a loop by its formula, each command against features by hand."""

from itertools import product
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import image_folder, randomised, read_table, save_noise
from PIL import Image

import analyze
import data
import finetune
import pretrain
from model import MODELS, ConvNeXt
from plumbing import frozen
from plumbing.files import load_file
from plumbing.loading import mix_seed


def test_cosine_distance_is_the_mean_over_pairs_of_live_channels():
    features, expected = torch.randn(3, 4, 5, 6, dtype=torch.float64), []
    features[1, :, :, 2] = 0
    for image in features.flatten(1, 2):  # (L, C)
        live = [channel for channel in image.T if channel.norm() > 0]
        pairs = [(1 - F.cosine_similarity(x, y, dim=0)) / 2 for x in live for y in live if x is not y]
        expected.append(sum(pairs) / len(pairs))
    torch.testing.assert_close(analyze.cosine_distance(features), torch.stack(expected))
    torch.testing.assert_close(analyze.cosine_distance(features.flatten(1, 2)), torch.stack(expected))
    x = torch.randn(1, 30, 30, 1)
    assert analyze.cosine_distance(x * torch.tensor([1.0, 2.0, 0.1])).item() == pytest.approx(0, abs=1e-6)
    assert analyze.cosine_distance((1000 * x * torch.tensor([1.0, -5.0])).half()).item() == pytest.approx(1, abs=1e-3)
    assert analyze.cosine_distance(x * torch.tensor([1.0, 0.0])).isnan().all()  # one live channel makes no pair


def test_a_channel_is_dead_saturated_or_neither():
    wave = torch.linspace(-1, 1, 25).view(1, 5, 5)
    features = torch.stack([wave, 0.001 * wave, 3 + 0.01 * wave, -3 + 0.01 * wave, 1 + wave, 0 * wave], dim=-1)
    assert analyze.dead_channels(features).tolist() == [[False, True, False, False, False, True]]
    assert analyze.saturated_channels(features).tolist() == [[False, False, True, True, False, False]]


def test_selectivity_is_its_formula():
    activity, labels = torch.rand(40, 5, dtype=torch.float64), torch.arange(40) % 4
    for c, value in enumerate(analyze.selectivity(activity, labels).tolist()):
        means = sorted(sum(activity[n, c].item() for n in range(40) if labels[n] == k) / 10 for k in range(4))
        rest = sum(means[:3]) / 3
        assert value == pytest.approx((means[3] - rest) / (means[3] + rest))
    assert analyze.selectivity(torch.zeros(40, 1), labels).isnan()  # silent


def test_means_stds_and_norms_are_over_space():
    features = torch.randn(2, 3, 4, 5)
    flat = features.flatten(1, 2)
    moments = torch.cat([flat.mean(dim=1), flat.std(dim=1, correction=0)], dim=1)
    torch.testing.assert_close(frozen.mean_and_std(features), moments)
    torch.testing.assert_close(analyze.mean_activity(features), flat.clamp(min=0).mean(dim=1))
    torch.testing.assert_close(analyze.channel_norms(features), flat.square().sum(dim=1).sqrt())


def test_knn_equals_a_plain_loop():
    bank, queries, bank_labels, labels = *torch.randn(2, 60, 8), torch.arange(60) % 3, torch.arange(60) // 20
    similarities = F.cosine_similarity(queries[:, None], bank, dim=2)
    for k in (1, 7, 100):
        votes = torch.zeros(60, 3)
        for n, row in enumerate(similarities.tolist()):
            for similarity, label in sorted(zip(row, bank_labels.tolist()))[-k:]:
                votes[n, label] += np.exp(similarity / 0.07)
        accuracy = (votes.argmax(dim=1) == labels).float().mean().item()
        assert frozen.knn_accuracy(bank, bank_labels, queries, labels, k) == pytest.approx(accuracy)


def test_the_ridge_probe_is_the_least_squares_fit_of_rows_and_penalties():
    bank, queries = torch.randn(40, 6), torch.randn(999, 6) + 0.5
    labels, truth = torch.arange(40) % 3, torch.arange(999) % 3
    bank[:, 5] = 7  # a constant feature has no weight
    std, mean = torch.std_mean(bank[:, :5].double(), dim=0, correction=0)
    x, y = ((part[:, :5].double() - mean) / std for part in (bank, queries))
    targets = F.one_hot(labels).double() - F.one_hot(labels).double().mean(dim=0)
    rows = torch.cat([x, (0.3 * 40) ** 0.5 * torch.eye(5, dtype=torch.float64)])
    fit = torch.linalg.lstsq(rows, torch.cat([targets, torch.zeros(5, 3)])).solution
    scores = y @ fit + F.one_hot(labels).double().mean(dim=0)
    accuracy = (scores.argmax(dim=1) == truth).double().mean().item()
    assert frozen.ridge_accuracy(bank, labels, queries, truth, strength=0.3) == pytest.approx(accuracy)


def test_effective_rank_counts_equal_orthogonal_channels_and_weighs_unequal_ones():
    maps = torch.linalg.qr(torch.randn(16, 16))[0].T.reshape(1, 4, 4, 16).double()  # orthonormal channels
    assert analyze.effective_rank(torch.cat([maps[..., :3]] * 20, dim=-1)).item() == pytest.approx(3, rel=1e-3)
    entropy = -(0.8 * np.log(0.8) + 0.2 * np.log(0.1))
    weighted = (maps[..., :3] * torch.tensor([8.0, 1, 1])).repeat(2, 1, 1, 1)
    assert analyze.effective_rank(weighted).tolist() == pytest.approx([np.exp(entropy)] * 2, rel=1e-5)


def yocto(**kwargs) -> ConvNeXt:
    torch.manual_seed(0)
    return randomised(MODELS["convnextv2_yocto"](stem_stride=1, **dict(num_classes=0) | kwargs)).eval()


@torch.no_grad()
def test_streaming_equals_all_images_at_once():
    network, x = yocto(num_classes=5), torch.randn(7, 3, 16, 16)
    batches = list(zip(x.split(3), torch.arange(7).split(3)))
    at_once = {"norm": network.forward_features(x)}
    for i, (downsample, stage) in enumerate(zip(network.downsample_layers, network.stages)):
        x = downsample(x)
        for j, block in enumerate(stage):
            act = block.act(block.pwconv1(block.norm(block.dwconv(x).permute(0, 2, 3, 1))))
            x, name = block(x), f"stages.{i}.{j}"
            at_once |= {f"{name}.act": act, f"{name}.grn": block.grn(act), name: x.permute(0, 2, 3, 1)}
    layers = ["act", "grn", "block", "norm"]
    measured, labels = analyze.collect_features(network, batches, layers, lambda features: 2 * features)
    assert measured.keys() == at_once.keys() and labels.tolist() == list(range(7))
    for name, features in measured.items():
        torch.testing.assert_close(features, 2 * at_once[name], rtol=1e-4, atol=1e-4)
    assert not any(module._forward_hooks for module in network.modules())


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Folders of images, and short runs: v2 and v1, pre-trained, and tuned."""
    root = tmp_path_factory.mktemp("runs")
    images = image_folder(root / "labelled", train=24, val=18)
    flags = dict(epochs=1, input_size=16, lr=0.1)
    helpers.run(pretrain, images, root / "v2", model="convnextv2_yocto", mask_ratio=0.5, **flags)
    helpers.run(pretrain, images, root / "v1", model="convnext_yocto", norm_pix_loss="false", **flags)
    helpers.run(finetune, images, root / "tuned", **flags | dict(model="convnextv2_yocto"))
    torch.save({"model": yocto(in_chans=1).state_dict()}, root / "grey.pth")
    return root


def run(command: str, output_dir: Path, *words) -> list[dict]:
    """Run a command in this process; the rows of its table."""
    analyze.main(analyze.get_args([command, "--output_dir", str(output_dir), *map(str, words)]))
    return read_table(output_dir / ("files.csv" if command == "features" else f"{command}.csv"))


def load(runs: Path, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised images (N, 3, 16, 16) and labels."""
    images = data.load_images("folder", runs / "labelled", split, data.center_transform(16))
    pixels = torch.stack([images[0, i][0] for i in range(len(images))])
    return data.normalise(pixels, data.STATISTICS["folder"], torch.device("cpu")), torch.tensor(images.labels)


def values(row: dict, *names: str) -> list[float]:
    return [float(row[name]) for name in names]


def test_reconstruct_shows_every_image_ratio_and_checkpoint_by_the_loss_of_training(runs, tmp_path):
    words = ("--checkpoint", runs / "v2", runs / "v1", "--mask_ratios", "0.3,0.5", "--num_images", 2)
    rows, other = run("reconstruct", tmp_path, *words), run("reconstruct", tmp_path, *words, "--seed", 1)
    assert len(rows) == 2 * 2 * 2 and {row["hidden_patches"] for row in rows} == {"2"} and rows[0]["patches"] == "4"
    assert [row["image"] for row in rows] != [row["image"] for row in other]
    checkpoint, index = runs / "v1/checkpoint-1.pth", int(rows[3]["image"])
    mae = analyze.load_mae(checkpoint)
    assert not mae.training and not mae.norm_pix_loss and mae.mask_ratio == 0.6
    helpers.assert_equal(mae.state_dict(), load_file(checkpoint)["model"])
    mae.mask_ratio, generator = 0.5, torch.Generator().manual_seed(mix_seed("mask", 0, index))
    loss = mae(load(runs, "val")[0][[index]], generator=generator)[0].item()
    assert values(rows[3], "mask_ratio", "loss") == pytest.approx([0.5, loss], rel=1e-4)


def test_collapse_tabulates_mean_and_std_over_images(runs, tmp_path):
    network = yocto()
    mlp = network.stages[1][0].pwconv1
    mlp.weight.data[:3], mlp.bias.data[:3] = 0, torch.tensor([-60.0, 3, 3])  # a dead channel, and two saturated ones
    torch.save({"model": network.state_dict()}, tmp_path / "odd.pth")
    words = ("--data_path", runs / "labelled", "--input_size", 16, "--batch_size", 5, "--label", "A", "B")
    rows = run("collapse", tmp_path, "--checkpoint", tmp_path / "odd.pth", runs / "v1", *words)
    tensors = [(row["checkpoint"], row["tensor"]) for row in rows]
    assert tensors == [("A", "after GELU")] * 6 + [("A", "after GRN")] * 6 + [("B", "after GELU")] * 6
    features = analyze.collect_features(network, [load(runs, "val")], "act")[0]["stages.1.0.act"]
    per_image = {name: getattr(analyze, name)(features) for name in ("cosine_distance", "effective_rank")}
    for kind in ("dead", "saturated"):
        per_image[f"{kind}_percent"] = 100 * getattr(analyze, f"{kind}_channels")(features).double().mean(dim=1)
    for name, numbers in per_image.items():
        expected = [numbers.mean().item(), numbers.std(correction=0).item()]
        assert values(rows[1], f"{name}_mean", f"{name}_std") == pytest.approx(expected, rel=1e-3)
    assert values(rows[1], "normalised_index", "dead_percent_mean") == pytest.approx([0.2, 100 / 192])


@torch.no_grad()
def test_probe_fits_training_images_and_scores_validation_images(runs, tmp_path):
    (x_train, train_labels), (x_val, val_labels), expected = load(runs, "train"), load(runs, "val"), []
    rows = run("probe", tmp_path, "--checkpoint", runs / "v2", "--untrained")
    assert [row["checkpoint"] for row in rows] == ["v2"] * 6 + ["untrained"] * 6
    maps = [analyze.load_network(runs / "v2/encoder.pth").forward_stages(x) for x in (x_train, x_val)]
    features = [[frozen.mean_and_std(x.permute(0, 2, 3, 1)) for x in part] for part in maps]
    for stages in ([0], [1], [2], [3], [2, 3]):
        train, val = (torch.cat([part[i] for i in stages], dim=1) for part in features)
        expected.append(100 * frozen.ridge_accuracy(train, train_labels, val, val_labels))
    std, mean = torch.std_mean(train.double(), dim=0, correction=0)  # of the last two stages
    bank, queries = ((part - mean) / std for part in (train, val))
    expected.append(100 * frozen.knn_accuracy(bank, train_labels, queries, val_labels))
    assert [float(row["accuracy"]) for row in rows[:6]] == pytest.approx(expected, abs=1e-4)


@torch.no_grad()
def test_features_are_those_of_every_image_and_neighbours_the_nearest(runs, tmp_path, monkeypatch):
    panels, draw = [], analyze.draw_panels
    monkeypatch.setattr(analyze, "draw_panels", lambda *args: panels.append(args) or draw(*args))
    words = ("--checkpoint", runs / "tuned", "--images", runs / "labelled/val", "--batch_size", 5)
    rows = run("features", tmp_path, *words)
    assert [row["file"] for row in rows] == sorted(map(str, (runs / "labelled/val").rglob("*.png")))
    network, (x, _) = analyze.load_network(runs / "tuned/checkpoint-best.pth"), load(runs, "val")
    np.testing.assert_allclose(np.load(tmp_path / "features.npy"), network.forward_features(x), rtol=1e-4, atol=1e-4)
    vectors = [frozen.mean_and_std(part.permute(0, 2, 3, 1)) for part in network.forward_stages(x)[2:]]
    features = frozen.standardised(torch.cat(vectors, dim=1))[0]
    images = data.load_images("folder", runs / "labelled", "val", data.center_transform(16))
    for k, query in enumerate([0, 2, 4, 6, 9, 11, 13, 15]):
        order = F.cosine_similarity(features[query], features).argsort(descending=True).tolist()
        order.remove(query)
        for rank, index in enumerate([query, *order[:5]]):
            title = f"tuned\n{rank}" if rank else "image"
            assert torch.equal(panels[0][0][title][k], images[0, index][0] / 255)
    assert "untrained\n5" in panels[0][0]
    run("features", tmp_path, "--checkpoint", runs / "v2", "--stage", 2, "--num_images", 9)
    saved, maps = np.load(tmp_path / "features.npy"), analyze.load_network(runs / "v2/encoder.pth").forward_stages(x)
    np.testing.assert_allclose(saved, maps[1].mean((2, 3))[data.choose(18, 9)], rtol=1e-4, atol=1e-4)


def test_grn_tabulates_percentiles_over_channels(runs, tmp_path):
    rows = run("grn", tmp_path, "--checkpoint", runs / "v2", "--num_images", 8)
    layer = analyze.load_network(runs / "v2/encoder.pth").stages[2][1].grn
    table, levels = {row["quantity"]: row for row in rows if row["block"] == "stages.2.1"}, (5, 25, 50, 75, 95)
    for name in ("gamma", "beta"):
        expected = np.percentile(getattr(layer, name).detach(), levels)
        assert values(table[name], *(f"percentile_{level}" for level in levels)) == pytest.approx(expected, rel=1e-3)
    assert len(rows) == 6 * 5 and len({row["percentile_50"] for row in table.values()}) == 5


def test_curves_are_those_of_the_logs_and_leave_out_other_folders(runs, tmp_path):
    (tmp_path / "log.jsonl").write_text('{"epoch": 1, "loss": 2}\n{"epoch": 1, "val_box_AP": 0.25, "val_box_AR1": 0.5}')
    (tmp_path / "config.json").write_text('{"images": 4, "fpn_dim": 32}')  # of a detector, which has no cross-entropy
    rows = run("curves", tmp_path, *sorted(runs.iterdir()), tmp_path, "--label", "tuned", "v1", "v2", "detector")
    points = {(row["run"], row["quantity"], row["epoch"], row["value"]) for row in rows}
    expected = {("detector", "loss", "1", "2"), ("detector", "val_box_AP", "1", "0.25")}
    for name, key in product(("tuned", "v1", "v2"), ("loss", "val_loss", "val_top1")):
        drawn = [(x, y) for x, y in helpers.read_log(runs / name, "epoch", key) if y is not None]
        expected |= {(name, key, f"{x:.6g}", f"{y:.6g}") for x, y in drawn}
    assert points == expected


def test_statistics_labels_flags_and_untrained_networks_follow_the_checkpoints(runs, tmp_path):
    network = MODELS["convnext_yocto"](num_classes=0, stem_stride=1)
    config = {"data_set": "embedded", "layer_scale_init_value": 0.5}
    torch.save({"model": network.state_dict(), "config": config}, tmp_path / "drawn.pth")
    words, weights = ["--checkpoint", str(tmp_path / "drawn.pth"), str(runs / "v2"), "--untrained", "--seed"], []
    for seed in "110":
        subjects = analyze.open_subjects(analyze.get_args(["collapse", *words, seed]), torch.device("cpu"))
        weights.append(subjects[2].model.stages[0][0].dwconv.weight)
    assert [subject.label for subject in subjects] == ["drawn", "v2", "untrained"]
    drawn, folder = data.STATISTICS["embedded"], data.STATISTICS["folder"]
    assert [subject.statistics for subject in subjects] == [drawn, folder, drawn]
    assert {block.gamma[0].item() for stage in subjects[2].model.stages for block in stage} == {0.5}
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    cases = {"v2": ("folder", str(runs / "labelled"), 16), "grey.pth": ("embedded", None, 48)}
    for words, expected in (cases | {"v2 --data_set embedded --input_size 8": ("embedded", None, 8)}).items():
        args = analyze.get_args(f"collapse --checkpoint {runs}/{words}".split())
        assert (args.data_set, args.data_path, args.input_size) == expected


def test_unreadable_images_are_left_out(runs, tmp_path, capsys):
    for name in ("train/0/0", "train/1/1", "val/0/0", "val/0/1", "val/1/2"):
        save_noise(tmp_path / f"{name}.png")
    (tmp_path / "val/0/0.png").write_bytes(b"no image")
    rows = run("features", tmp_path, "--checkpoint", runs / "v2", "--data_path", tmp_path)
    assert [(Path(row["file"]).name, row["class"]) for row in rows] == [("1.png", "0"), ("2.png", "1")]
    assert len(np.load(tmp_path / "features.npy")) == 2
    assert capsys.readouterr().err.count("cannot read") == 1
    words = ("--layer", "stages.0.0", "--images", *sorted(tmp_path.glob("val/*/*.png")))
    assert len(run("activations", tmp_path, "--checkpoint", runs / "v2", *words)) == 2 * 24


@pytest.mark.parametrize("command", [name for name in analyze.COMMANDS if name != "curves"])
def test_figures_hold_their_titles(runs, tmp_path, monkeypatch, drawn, command):
    figures, save = [], analyze.save_figure
    monkeypatch.setattr(analyze, "save_figure", lambda figure, path: figures.append(figure) or save(figure, path))
    rows = run(command, tmp_path, "--checkpoint", runs / "v2", "--label", "$\\frac$")
    assert command != "selectivity" or len(rows) == 24 + 48 + 3 * 96 + 192  # every block's channels
    assert min(Image.open(next(tmp_path.glob("*.png"))).size) > 250
    if title := figures[0]._suptitle:
        box, whole = title.get_window_extent(), figures[0].bbox
        assert whole.x0 <= box.x0 and box.x1 <= whole.x1 and box.y1 <= whole.y1
