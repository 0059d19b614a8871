"""Claims about analyze.py: each measure against a loop written from its formula, each command by running it."""

import argparse
import csv
import json
from pathlib import Path

import pytest
import torch
from helpers import TINY, randomised
from PIL import Image

import analyze
import data
from fcmae import FCMAE
from model import ConvNeXt
from plumbing.files import load_file
from plumbing.seeds import mix_seed

# --- measures ---------------------------------------------------------------------------------------------------------


def test_cosine_distance_is_the_mean_over_pairs_of_live_channels():
    features = torch.randn(3, 4, 5, 6, dtype=torch.float64)
    features[1, :, :, 2] = 0
    expected = []
    for image in features.flatten(1, 2):  # (L, C)
        pairs = []
        for i in range(6):
            for j in range(6):
                x, y = image[:, i], image[:, j]
                if i != j and x.norm() > 0 and y.norm() > 0:
                    pairs.append((1 - (x @ y) / (x.norm() * y.norm())) / 2)
        expected.append(sum(pairs) / len(pairs))
    assert len(pairs) == 30
    torch.testing.assert_close(analyze.cosine_distance(features), torch.stack(expected))
    torch.testing.assert_close(analyze.cosine_distance(features.flatten(1, 2)), torch.stack(expected))


def test_cosine_distance_of_alike_channels_is_0_of_an_opposite_pair_1_and_of_orthogonal_ones_a_half():
    x = torch.randn(1, 7, 7, 1)
    assert analyze.cosine_distance(x * torch.tensor([1.0, 2.0, 0.1, 30.0])).item() == pytest.approx(0, abs=1e-6)
    assert analyze.cosine_distance(x * torch.tensor([1.0, -5.0])).item() == pytest.approx(1)
    assert analyze.cosine_distance(torch.eye(9)[None]).item() == pytest.approx(0.5)


def test_dead_channels_are_counted_and_do_not_move_the_cosine_distance():
    alive = torch.randn(2, 5, 5, 8)
    features = torch.cat([alive, torch.zeros(2, 5, 5, 3)], dim=-1)
    torch.testing.assert_close(analyze.cosine_distance(features), analyze.cosine_distance(alive))
    assert analyze.dead_channels(features).sum(dim=1).tolist() == [3, 3]
    only = torch.zeros(1, 5, 5, 3)
    assert analyze.dead_channels(only).all() and analyze.cosine_distance(only).isnan().all()
    only[..., 0] = 1
    assert analyze.cosine_distance(only).isnan().all()  # one direction makes no pair


def test_cosine_distance_of_half_precision_features_does_not_overflow():
    features = torch.randn(1, 30, 30, 4)
    torch.testing.assert_close(
        analyze.cosine_distance((100 * features).half()), analyze.cosine_distance(features), rtol=1e-3, atol=1e-3
    )


def test_a_channel_is_dead_saturated_or_neither():
    wave = torch.linspace(-1, 1, 25).view(1, 5, 5)
    features = torch.stack([wave, 0.001 * wave, 3 + 0.01 * wave, -3 + 0.01 * wave, 1 + wave, 0.001 + 0 * wave], dim=-1)
    assert analyze.dead_channels(features).tolist() == [[False, True, False, False, False, True]]
    assert analyze.saturated_channels(features).tolist() == [[False, False, True, True, False, False]]


def test_selectivity_is_its_formula():
    activity, labels = torch.rand(40, 5, dtype=torch.float64), torch.arange(40) % 4
    for c, value in enumerate(analyze.selectivity(activity, labels).tolist()):
        means = sorted(sum(activity[n, c].item() for n in range(40) if labels[n] == k) / 10 for k in range(4))
        rest = sum(means[:3]) / 3
        assert value == pytest.approx((means[3] - rest) / (means[3] + rest))


def test_selectivity_is_1_for_one_class_0_for_all_alike_and_undefined_for_silence():
    labels = torch.tensor([0, 0, 1, 2, 2])
    activity = torch.stack([(labels == 2).float(), torch.ones(5), torch.zeros(5)], dim=1)
    index = analyze.selectivity(activity, labels)
    assert index[:2].tolist() == [1, 0] and index[2].isnan()
    with pytest.raises(ValueError, match="at least two"):
        analyze.selectivity(activity, torch.zeros(5))


def test_mean_activity_counts_the_positive_part_only():
    features = torch.tensor([[1.0, -4.0], [3.0, 2.0]])[None]  # (1, L, C)
    assert analyze.mean_activity(features).tolist() == [[2, 1]]


def test_knn_equals_a_plain_loop():
    generator = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(60, 8, generator=generator), torch.randn(30, 8, generator=generator)
    bank_labels, labels = torch.arange(60) % 3, torch.arange(30) % 3
    for k in (1, 7, 100):
        right = 0
        for query, label in zip(queries, labels):
            near = sorted(((query @ other / (query.norm() * other.norm())).item(), i) for i, other in enumerate(bank))[-k:]
            votes = [0.0, 0.0, 0.0]
            for similarity, i in near:
                votes[bank_labels[i]] += torch.tensor(similarity / 0.07).exp().item()
            right += votes.index(max(votes)) == label
        assert analyze.knn_accuracy(bank, bank_labels, queries, labels, k) == right / 30


def test_knn_finds_every_query_that_is_in_the_bank():
    bank, labels = torch.randn(700, 16), torch.arange(700) % 10
    assert analyze.knn_accuracy(bank, labels, 3 * bank, labels, k=1) == 1


def test_the_ridge_probe_is_the_least_squares_fit_of_rows_and_penalties():
    known, labels = torch.randn(40, 6), torch.arange(40) % 3
    found, truth = torch.randn(50, 6) + 0.5, torch.arange(50) % 3
    known[:, 4] = 7  # a constant feature says nothing
    mean, std = known.double().mean(dim=0), known.double().std(dim=0, correction=0)
    x, y = ((part.double() - mean)[:, [0, 1, 2, 3, 5]] / std[[0, 1, 2, 3, 5]] for part in (known, found))
    targets = torch.nn.functional.one_hot(labels).double()
    penalties = (0.3 * 40) ** 0.5 * torch.eye(5, dtype=torch.float64)
    fit = torch.linalg.lstsq(torch.cat([x, penalties]), torch.cat([targets - targets.mean(dim=0), torch.zeros(5, 3)])).solution
    right = ((y @ fit + targets.mean(dim=0)).argmax(dim=1) == truth).double().mean().item()
    assert analyze.ridge_accuracy(known, labels, found, truth, strength=0.3) == pytest.approx(right)
    assert analyze.ridge_accuracy(10 * torch.eye(3).repeat(5, 1), torch.arange(15) % 3, torch.eye(3), torch.arange(3)) == 1


def test_effective_rank_counts_equal_orthogonal_channels_and_weighs_unequal_ones():
    maps = torch.linalg.qr(torch.randn(16, 16))[0].T.reshape(1, 4, 4, 16).double()  # orthonormal channels
    assert analyze.effective_rank(maps).item() == pytest.approx(16, rel=1e-6)
    assert analyze.effective_rank(maps[..., :5]).item() == pytest.approx(5, rel=1e-6)
    wide = torch.cat([maps[..., :3]] * 20, dim=-1)  # more channels than sites, of three directions
    assert analyze.effective_rank(wide).item() == pytest.approx(3, rel=1e-3)
    shares = torch.tensor([8.0, 1, 1], dtype=torch.float64) / 10
    weighed = (maps[..., :3] * torch.tensor([8.0, 1, 1])).repeat(2, 1, 1, 1)
    expected = (-(shares * shares.log()).sum()).exp().item()
    assert analyze.effective_rank(weighed).tolist() == pytest.approx([expected, expected], rel=1e-5)


def test_pca_equals_the_svd_up_to_sign():
    features = torch.randn(50, 6, dtype=torch.float64) * torch.tensor([5, 4, 3, 2, 1, 1]) + 7
    points, share = analyze.pca(features, components=3)
    u, s, _ = torch.linalg.svd(features - features.mean(dim=0), full_matrices=False)
    torch.testing.assert_close(points.abs(), (u * s)[:, :3].abs())
    torch.testing.assert_close(share, s[:3] ** 2 / s.square().sum())
    torch.testing.assert_close(analyze.pca(features, components=3)[0], points)


# --- features ---------------------------------------------------------------------------------------------------------


def tiny(version: int = 2, **kwargs) -> ConvNeXt:
    torch.manual_seed(0)
    return randomised(ConvNeXt(**TINY, **dict(num_classes=0, stem_stride=1, version=version) | kwargs)).eval()


@torch.no_grad()
def test_streaming_equals_all_images_at_once():
    network, imgs, labels = tiny(), torch.randn(7, 3, 16, 16), torch.arange(7)
    batches = list(zip(imgs.split(3), labels.split(3)))
    found, order = analyze.collect_features(network, batches, ["grn", "block"], analyze.channel_norms)
    assert torch.equal(order, labels) and len(found) == 10
    x, at_once = imgs, {}
    for i, (downsample, stage) in enumerate(zip(network.downsample_layers, network.stages)):
        x = downsample(x)
        for j, block in enumerate(stage):
            wide = block.grn(block.act(block.pwconv1(block.norm(block.dwconv(x).permute(0, 2, 3, 1)))))
            x = block(x)
            at_once[f"stages.{i}.{j}.grn"], at_once[f"stages.{i}.{j}"] = wide, x.permute(0, 2, 3, 1)
    assert found.keys() == at_once.keys()
    for name, features in at_once.items():
        torch.testing.assert_close(found[name], features.square().sum(dim=(1, 2)).sqrt())
    whole, _ = analyze.collect_features(network, batches, "stages.2.1.grn")
    torch.testing.assert_close(whole["stages.2.1.grn"], at_once["stages.2.1.grn"])
    assert not any(module._forward_hooks for module in network.modules())


@torch.no_grad()
def test_without_grn_the_two_wide_tensors_are_one_and_norm_is_the_pooled_feature():
    network, imgs = tiny(version=1, num_classes=5), torch.randn(2, 3, 16, 16)
    found, _ = analyze.collect_features(network, [(imgs, torch.zeros(2))], ["act", "grn", "norm"])
    assert torch.equal(found["stages.3.0.act"], found["stages.3.0.grn"])
    torch.testing.assert_close(found["norm"], network.forward_features(imgs))


# --- commands ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Run directories as the training scripts leave them: v2 and v1 pre-training, fine-tuning; and folders of images."""
    root = tmp_path_factory.mktemp("runs")
    pictures, _ = data.draw_images(24, seed=0, size=20)
    for i, picture in enumerate(pictures):
        for folder in (
            "flat",
            f"labelled/train/{i % 2}",
            f"labelled/val/{i % 2}",
            "one/train/a",
            "one/val/a",
            f"odd/train/{i % 2}",
            "odd/val/1",
        ):
            (root / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(root / folder / f"{i}.png")
    config = dict(data_set="folder", data_path=str(root / "labelled"), input_size=16, images=24)
    for version in (1, 2):
        network, directory = tiny(version), root / f"v{version}"
        mae = FCMAE(network, decoder_embed_dim=16)
        directory.mkdir()
        flags = config | dict(mask_ratio=0.5, norm_pix_loss=version == 2)
        torch.save({"model": mae.state_dict(), "config": flags}, directory / "checkpoint-3.pth")
        torch.save({"model": network.state_dict(), "config": flags}, directory / "encoder.pth")
        write_log(directory, flags, [{"epoch": 0.5 * k, "loss": 1 / k, "lr": 0.1} for k in range(1, 5)])
    (root / "tuned").mkdir()
    torch.save({"model": tiny(num_classes=2).state_dict(), "config": config}, root / "tuned/checkpoint-best.pth")
    write_log(root / "tuned", config, [{"epoch": k, "loss": 2 / k, "val_top1": 10 * k} for k in range(1, 4)])
    return root


def write_log(directory, config, records):
    (directory / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (directory / "config.json").write_text(json.dumps(config))


def run(command, output_dir, *words) -> list[dict]:
    """Run a command in this process; the rows of its table, once picture and table are there."""
    words = [*words, *([] if command == "curves" else ["--device", "cpu"])]
    analyze.main(analyze.get_args([command, "--output_dir", str(output_dir), *map(str, words)]))
    assert min(Image.open(output_dir / f"{command}.png").size) > 250
    with open(output_dir / f"{command}.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_reconstruct_shows_every_image_ratio_and_checkpoint(runs, tmp_path):
    options = ("--mask_ratios", "0.3,0.5", "--num_images", 3)
    rows = run("reconstruct", tmp_path, "--checkpoint", runs / "v2", runs / "v1", *options)
    assert len(rows) == 3 * 2 * 2 and {row["hidden_patches"] for row in rows} == {"2"} and rows[0]["patches"] == "4"
    assert rows == run("reconstruct", tmp_path, "--checkpoint", runs / "v2", runs / "v1", *options)
    other = run("reconstruct", tmp_path, "--checkpoint", runs / "v2", runs / "v1", *options, "--seed", 1)
    assert [row["image"] for row in rows] != [row["image"] for row in other]


def test_reconstruct_takes_the_loss_and_ratio_of_training(runs, tmp_path):
    picture = runs / "flat/0.png"
    row = run("reconstruct", tmp_path, "--checkpoint", runs / "v2/checkpoint-3.pth", "--images", picture)[0]
    mae, generator = analyze.load_mae(runs / "v2/checkpoint-3.pth"), torch.Generator()
    pixels = data.center_transform(16)(Image.open(picture))[None]
    generator.manual_seed(mix_seed("mask", 0, 0))
    with torch.no_grad():
        loss, _, _ = mae(data.normalise(pixels, data.STATISTICS["folder"], torch.device("cpu")), generator=generator)
    assert float(row["mask_ratio"]) == 0.5 and float(row["loss"]) == pytest.approx(loss.item(), rel=1e-4)


@pytest.mark.parametrize("mode", ["L", "RGBA", "I;16"])
def test_reconstruct_takes_pictures_of_any_size_and_kind(runs, tmp_path, mode):
    Image.new(mode, (90, 41)).save(tmp_path / "picture.png")
    assert len(run("reconstruct", tmp_path, "--checkpoint", runs / "v2", "--images", tmp_path / "picture.png")) == 1


def test_collapse_tabulates_the_mean_and_spread_over_images(runs, tmp_path):
    rows = run("collapse", tmp_path, "--checkpoint", runs / "v2", runs / "v1", "--label", "A", "B", "--batch_size", 5)
    tensors = [(row["checkpoint"], row["tensor"]) for row in rows]
    assert tensors == [("A", "after GELU")] * 5 + [("A", "after GRN")] * 5 + [("B", "after GELU")] * 5
    assert [float(row["normalised_index"]) for row in rows[:5]] == [0, 0.25, 0.5, 0.75, 1]

    images = data.load_images("folder", runs / "labelled", "val", data.center_transform(16))
    pixels = torch.stack([images[0, i][0] for i in range(24)])
    imgs = data.normalise(pixels, images.statistics, torch.device("cpu"))
    network = analyze.load_network(runs / "v2/encoder.pth")
    features = analyze.collect_features(network, [(imgs, torch.zeros(24))], "stages.1.0.grn")[0]["stages.1.0.grn"]
    distance = analyze.cosine_distance(features)
    assert float(rows[6]["cosine_distance_mean"]) == pytest.approx(distance.mean().item(), rel=1e-4)
    assert float(rows[6]["cosine_distance_std"]) == pytest.approx(distance.std(correction=0).item(), rel=1e-3)


def test_activations_selectivity_grn_embed_and_probe_run_on_every_kind_of_checkpoint(runs, tmp_path):
    both = ("--checkpoint", runs / "v2", runs / "v1/encoder.pth", "--label", "V2", "V1")
    assert len(run("activations", tmp_path, *both, "--num_images", 2)) == 2 * 2 * 4 * 32
    assert len(run("activations", tmp_path, *both, "--layer", "stages.3.0", "--images", runs / "flat/0.png")) == 2 * 64
    assert len(run("selectivity", tmp_path, *both, "--untrained")) == 3 * (8 + 16 + 2 * 32 + 64)
    rows = run("grn", tmp_path, "--checkpoint", runs / "v2", runs / "tuned")
    assert len(rows) == 2 * 5 * 5 and all(float(row["percentile_5"]) <= float(row["percentile_95"]) for row in rows)
    rows = run("embed", tmp_path, "--checkpoint", runs / "tuned", "--neighbours", 1)
    assert len(run("probe", tmp_path, *both, "--untrained")) == 3 * 5
    assert len(rows) == 24 and {row["knn_accuracy"] for row in rows} == {"100"}  # val and train are the same pictures


def test_the_untrained_network_starts_as_the_trained_one_did(tmp_path):
    config = {"data_set": "embedded", "layer_scale_init_value": 0.5}
    torch.save(
        {"model": ConvNeXt(**TINY, version=1, num_classes=0, stem_stride=1).state_dict(), "config": config}, tmp_path / "v1.pth"
    )
    args = analyze.get_args(["collapse", "--checkpoint", str(tmp_path / "v1.pth"), "--untrained", "--device", "cpu"])
    fresh = analyze.open_subjects(args)[1].model
    assert {block.gamma[0].item() for stage in fresh.stages for block in stage} == {0.5}


def test_the_figure_of_a_deep_network_shows_twelve_blocks(runs, tmp_path):
    deep = ConvNeXt((3, 3, 9, 3), (2, 4, 8, 16), num_classes=0, stem_stride=1)
    torch.save({"model": deep.state_dict()}, tmp_path / "deep.pth")
    data_flags = ("--data_path", runs / "labelled", "--input_size", 16, "--num_images", 6)
    rows = run("selectivity", tmp_path, "--checkpoint", tmp_path / "deep.pth", runs / "v2", *data_flags)
    assert {row["checkpoint"] for row in rows} == {"deep", "v2"}


def test_curves_aligns_runs_of_both_stages_and_leaves_out_other_folders(runs, tmp_path):
    paths = sorted(runs.iterdir())
    rows = run("curves", tmp_path, *paths)
    assert {(Path(row["run"]).name, row["quantity"]) for row in rows} == {
        ("v1", "loss"), ("v2", "loss"), ("tuned", "loss"), ("tuned", "val_top1"),
    }  # fmt: skip
    seen = run("curves", tmp_path, *paths, "--x", "images")
    assert [float(row["images"]) for row in seen] == [24 * float(row["epoch"]) for row in rows]


def test_the_network_is_the_one_that_was_saved(runs):
    network, mae = analyze.load_network(runs / "tuned/checkpoint-best.pth"), analyze.load_mae(runs / "v1/checkpoint-3.pth")
    imgs = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(network(imgs), tiny(num_classes=2)(imgs))
    assert network.num_classes == 2 and mae.encoder.version == 1 and not mae.norm_pix_loss and not mae.training
    saved = load_file(runs / "v1/checkpoint-3.pth")["model"]
    assert all(torch.equal(value, saved[key]) for key, value in mae.state_dict().items())


def test_flags_without_defaults_are_filled_from_the_first_checkpoint(runs):
    args = analyze.get_args(["collapse", "--checkpoint", str(runs / "v2")])
    args.device = torch.device("cpu")
    subject = analyze.open_subjects(args)[0]
    assert (args.data_set, args.input_size, subject.label) == ("folder", 16, "v2")
    assert subject.statistics == data.STATISTICS["folder"] and isinstance(args, argparse.Namespace)
