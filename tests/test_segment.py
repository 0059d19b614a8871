"""Claims about segment.py, segmenter.py and maps.py, each against something independent."""

import json
import math
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import stress
import torch
import torch.nn.functional as F
from helpers import ALONE, TINY, assert_equal, call_at, randomised, save_noise, words, write_maps
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2

import maps
import segment
from data import SHAPES, STATISTICS, draw_images, draw_scenes
from model import MODELS, ConvNeXt
from plumbing import layouts
from plumbing.files import find_checkpoints, load_file, save_tensors
from plumbing.log import read_log
from plumbing.optim import averaged, layer_groups
from plumbing.scores import segmentation_scores
from plumbing.script import UserError, run_script
from plumbing.seeds import mix_seed
from segment import UPerNet
from segmenter import BatchNorm, segmentation_losses

pytestmark = pytest.mark.usefixtures("small_models")
SMALL = dict(
    input_size=32, test_size=40, stem_stride=2, channels=8, aux_channels=8, batch_size=2, epochs=2, num_workers=0, log_every=1,
    device="cpu", lr=1e-3,
)  # fmt: skip


def small_network(**kwargs) -> ConvNeXt:
    return ConvNeXt(**TINY, **kwargs)


def trained(network: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Every weight and every statistic drawn anew, ready to evaluate."""
    randomised(network, seed)
    for name, value in network.named_buffers():
        if "running" in name:
            value.copy_(torch.rand(value.shape, generator=torch.Generator().manual_seed(seed)) + 0.5)
    return network.eval()


@pytest.fixture
def folder(tmp_path) -> Path:
    for split, count in (("training", 6), ("validation", 3)):
        write_maps(tmp_path / "ade", split, count, seed=len(split))
    return tmp_path / "ade"


def run(data_path, output_dir, **flags) -> dict:
    """A run of seconds; its last checkpoint."""
    segment.main(segment.get_args(words(data_path=data_path, output_dir=output_dir, **SMALL | flags)))
    return load_file(find_checkpoints(output_dir)[-1])


# --- the network ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def another():
    """transformers' UPerNet, its weights and statistics drawn at random."""
    transformers = pytest.importorskip("transformers")
    stages = [f"stage{i}" for i in range(1, 5)]
    backbone = transformers.ConvNextV2Config(depths=[1, 1, 2, 1], hidden_sizes=[8, 16, 32, 64], out_features=stages)
    config = transformers.UperNetConfig(
        backbone_config=backbone, hidden_size=16, auxiliary_channels=8, auxiliary_in_channels=32, num_labels=5
    )
    return trained(transformers.UperNetForSemanticSegmentation(config))


def as_ours(theirs, tmp_path) -> UPerNet:
    """Ours with their weights, by way of a file."""
    save_tensors(tmp_path / "upernet.pth", theirs.state_dict())
    ours = UPerNet(small_network(num_classes=0), 5, 16, 8)
    lines = " ".join(layouts.load_parts(ours, ours.encoder, tmp_path / "upernet.pth", "segmenter"))
    assert "of the segmenter are left out" in lines and "initial" not in lines
    return ours.eval()


@pytest.mark.parametrize("shape", [(2, 3, 64, 64), (1, 3, 97, 130), (3, 3, 70, 64)])
def test_logits_are_those_of_transformers_on_the_same_weights(another, shape, tmp_path):
    ours, imgs = as_ours(another, tmp_path), torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = another(imgs).logits
        torch.testing.assert_close(ours(imgs), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_losses_and_gradients_are_those_of_transformers_in_training(another, tmp_path):
    ours, generator = as_ours(another, tmp_path), torch.Generator().manual_seed(0)
    imgs, labels = torch.randn(3, 3, 64, 96, generator=generator), torch.randint(5, (3, 64, 96), generator=generator)
    labels[:, :9] = 255
    ours.train().dropout.eval()  # theirs has none
    losses = segmentation_losses(*ours(imgs), labels)
    sum(losses.values()).backward()
    another.train().zero_grad()
    try:
        expected = another(imgs, labels=labels).loss
        expected.backward()
    finally:
        another.eval()
    assert sum(losses.values()).item() == pytest.approx(expected.item(), rel=1e-5)
    theirs = layouts.upernet_names({name: p.grad for name, p in another.named_parameters()})
    for name, parameter in ours.named_parameters():
        scale = theirs[name].abs().max().item()
        torch.testing.assert_close(parameter.grad, theirs[name].reshape(parameter.shape), rtol=0, atol=1e-4 * scale + 1e-7)


@pytest.mark.parametrize(("depths", "dims", "millions"), [((3, 3, 9, 3), 96, 60.29), ((3, 3, 27, 3), 128, 122.23)])
def test_parameters_are_those_of_the_published_segmenters(depths, dims, millions):
    with torch.device("meta"):
        segmenter = UPerNet(ConvNeXt(depths, tuple(dims << i for i in range(4)), num_classes=0), 150)
    assert sum(p.numel() for p in segmenter.parameters()) == pytest.approx(1e6 * millions, abs=0.01e6)


def test_tensors_have_the_documented_names():
    names = UPerNet(small_network(num_classes=0), 5, 16, 8).state_dict().keys()
    pairs = [f"ppm.{i}" for i in range(4)] + [f"{part}.{i}" for part in ("lateral", "fpn") for i in range(3)]
    pairs += ["bottleneck", "fuse", "auxiliary.0"]
    outer = {name.rsplit(".", 1)[0] for name in names if not name.startswith("encoder.")}
    assert outer == {f"{pair}.{k}" for pair in pairs for k in (0, 1)} | {f"norms.{i}" for i in range(4)} | {
        "classifier",
        "auxiliary.1",
    }


def test_pixels_that_are_not_counted_change_nothing():
    logits, labels = (torch.randn(2, 3, 4, 5) for _ in range(2)), torch.randint(3, (2, 4, 5))
    head, auxiliary = logits
    labels[0, :2] = 255
    kept = labels.flatten() != 255
    found = segmentation_losses(head, auxiliary, labels)
    for name, each, weight in (("loss_head", head, 1), ("loss_auxiliary", auxiliary, 0.4)):
        rows = each.permute(0, 2, 3, 1).reshape(-1, 3)[kept].log_softmax(dim=1)
        expected = -sum(row[label] for row, label in zip(rows, labels.flatten()[kept])) / kept.sum()
        assert found[name].item() == pytest.approx(weight * expected.item(), rel=1e-5)
    nothing = segmentation_losses(head, auxiliary, torch.full_like(labels, 255))
    assert all(value == 0 for value in nothing.values())


def test_weights_of_classes_are_powers_of_their_shares_and_multiply_the_loss_of_their_pixels():
    labels = np.zeros((2, 4, 5), dtype=np.uint8)  # of 40 pixels 32 are of class 0, 2 of class 1, none of class 2, 6 not counted
    labels[1, 0, :2], labels[1, 1], labels[1, 2, 0] = 1, 255, 255
    data = maps.LabelMaps(np.zeros((2, 4, 5, 3), dtype=np.uint8), labels, ["a", "b", "c"], maps.class_colours(3), "embedded")
    weights, shares = maps.class_weights(data, 0.5), torch.tensor([32 / 34, 2 / 34, 1e-4])
    torch.testing.assert_close(weights / weights[0], (shares[0] / shares).sqrt())
    assert weights[torch.from_numpy(labels[labels != 255]).long()].mean().item() == pytest.approx(1, abs=0.01)
    torch.testing.assert_close(maps.class_weights(data, 0.0), torch.ones(3), atol=1e-3, rtol=0)

    logits, labels = torch.randn(2, 3, 4, 5), torch.from_numpy(labels).long()
    found = segmentation_losses(logits, logits, labels, weights)["loss_head"]
    rows, places = logits.log_softmax(dim=1), (labels != 255).nonzero().tolist()
    expected = -sum(weights[labels[n, y, x]] * rows[n, labels[n, y, x], y, x] for n, y, x in places) / len(places)
    torch.testing.assert_close(found, expected)


def test_batch_norm_of_two_processes_is_that_of_one_with_both_batches(tmp_path):
    generator = torch.Generator().manual_seed(0)
    x, weights = torch.randn(4, 3, 2, 5, generator=generator) * 3 + 100, torch.randn(4, 3, 2, 5, generator=generator)

    def outcome(x, weights) -> dict:
        norm, x = trained(BatchNorm(3)).train(), x.clone().requires_grad_()
        y = norm(x)
        (y * weights).sum().backward()
        return {"y": y.detach(), "x.grad": x.grad, "gamma": norm.weight.grad, "beta": norm.bias.grad} | norm.state_dict()

    def work():
        from plumbing.processes import setup_processes

        processes = setup_processes("cpu")
        mine = slice(2 * processes.rank, 2 * processes.rank + 2)
        save_tensors(tmp_path / f"{processes.rank}.pth", outcome(x[mine], weights[mine]))

    stress.wait(stress.fork(work, tmp_path, 2))
    whole, parts = outcome(x, weights), [load_file(tmp_path / f"{rank}.pth") for rank in range(2)]
    for name in ("y", "x.grad"):
        torch.testing.assert_close(torch.cat([part[name] for part in parts]), whole[name], rtol=1e-3, atol=1e-4)
    for name in ("gamma", "beta"):
        torch.testing.assert_close(parts[0][name] + parts[1][name], whole[name], rtol=1e-3, atol=1e-4)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(parts[1][name], whole[name], rtol=1e-4, atol=1e-4)


def test_an_average_has_the_averages_of_batch_norms_statistics():
    norm = torch.nn.BatchNorm2d(2)
    ema, expected = averaged(norm, 0.9), None
    for t in range(5):
        norm(torch.randn(4, 2, 3, 3) + t)
        ema.update_parameters(norm)
        keep = min(0.9, (1 + t) / (10 + t))
        expected = norm.running_mean.clone() if t == 0 else keep * expected + (1 - keep) * norm.running_mean
    torch.testing.assert_close(ema.module.running_mean, expected)
    assert ema.module.num_batches_tracked == 5


@pytest.mark.parametrize(("depths", "last"), [((3, 3, 9, 3), 6), ((3, 3, 27, 3), 12)])
def test_layers_have_the_published_rates(depths, last):
    segmenter = UPerNet(ConvNeXt(depths, (4, 4, 4, 4), num_classes=0), 2, 4, 4)
    groups = layer_groups(segmenter, 0.05, 0.9, "group", depths)
    rate = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    layers = {"downsample_layers.0": 0, "stages.0": 1, "downsample_layers.1": 2, "stages.1": 2, "downsample_layers.2": 3}
    layers |= {f"stages.2.{j}": 3 + j // 3 for j in range(depths[2])} | {"downsample_layers.3": last, "stages.3": last}
    for name, parameter in segmenter.named_parameters():
        inner = name.removeprefix("encoder.")
        layer = next((layer for start, layer in layers.items() if f"{inner}.".startswith(f"{start}.")), last + 1)
        assert rate[id(parameter)] == pytest.approx(0.9 ** (last + 1 - layer)), name


# --- label maps -------------------------------------------------------------------------------------------------------


def test_the_embedded_pictures_are_detections_and_their_labels_the_shapes():
    few, more = (maps.embedded_maps("train", 32, count=count) for count in (50, 120))
    assert (few.items == more.items[:50]).all() and (few.maps == more.maps[:50]).all()
    found = maps.embedded_maps("val", 64, count=50)
    pictures, kinds, masks = draw_scenes(50, 1, 64)
    assert (
        (found.items == pictures).all() and (pictures == draw_images(50, 1, 64)[0]).all() and found.classes == ["ground", *SHAPES]
    )
    for labels, of_picture, shown in zip(found.maps, kinds, masks):
        assert all((labels[mask] == kind + 1).all() for kind, mask in zip(of_picture, shown))
        assert (labels[~shown.any(axis=0)] == 0).all()


LABELS = np.array([[0, 1, 2], [3, 255, 1]])


@pytest.mark.parametrize("mode", ["P", "L", "I;16", "I"])
def test_label_maps_of_every_kind_are_read_alike(tmp_path, mode):
    image = Image.fromarray(LABELS.astype(np.int32 if mode == "I" else np.uint16 if mode == "I;16" else np.uint8))
    if mode == "P":
        image.putpalette([17, 34, 51] * 256)  # colours mean nothing
    file = tmp_path / ("labels.tif" if mode == "I" else "labels.png")
    image.save(file)
    assert Image.open(file).mode == mode
    assert (maps.read_labels(file, 4) == LABELS).all()
    reduced = maps.read_labels(file, 3, reduce_zero_label=True)
    assert reduced.tolist() == [[255, 0, 1], [2, 255, 0]]
    for reduce, labels in ((False, LABELS.astype(np.uint8)), (True, reduced)):
        maps.write_labels(tmp_path / "written.png", labels, [(9, 8, 7)] * 4, reduce)
        assert (maps.read_labels(tmp_path / "written.png", 4, reduce) == labels).all()


def test_labels_beyond_the_classes_are_named(tmp_path):
    for value, dtype in ((7, np.uint8), (300, np.uint16)):
        Image.fromarray(np.where(LABELS == 2, value, LABELS).astype(dtype)).save(tmp_path / "x.png")
        with pytest.raises(UserError, match=rf"x.png has the label {value}, but the 4 classes have 0 to 3"):
            maps.read_labels(tmp_path / "x.png", 4)
    with pytest.raises(UserError, match="has the label 300, but the 3 classes have 1 to 3"):
        maps.read_labels(tmp_path / "x.png", 3, reduce_zero_label=True)


def test_classes_are_read_from_every_kind_of_list(tmp_path):
    file = tmp_path / "classes.txt"
    file.write_text("sky 70 130 180\ntraffic light, 250, 170, 30\n")
    assert maps.read_classes(file) == (["sky", "traffic light"], [(70, 130, 180), (250, 170, 30)])
    file.write_text("sky\n\ntraffic light\n")
    assert maps.read_classes(file) == (["sky", "traffic light"], None)
    file.write_text(
        "Idx\tRatio\tTrain\tVal\tStuff\tName\n1\t0.1576\t11664\t1172\t1\twall\n2\t0.1072\t6046\t612\t1\tbuilding, edifice\n"
    )
    assert maps.read_classes(file) == (["wall", "building, edifice"], None)
    for text, message in (("", "names 0 classes"), ("a\nb\na", "the class a more than once"), ("a 1 2 300", "end at 255")):
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            maps.read_classes(file)


def test_without_names_there_are_as_many_classes_as_in_the_training_maps(folder):
    (folder / "classes.txt").unlink()
    labels = [np.asarray(Image.open(path)) for path in (folder / "annotations/training").iterdir()]
    names, colours, line = maps.find_classes(folder, None, None, False)
    assert len(names) == len(set(colours)) == max(map(np.max, labels)) + 1 and "as the training maps have" in line
    assert len(maps.find_classes(folder, None, 40, False)[0]) == 40


def test_colours_can_be_told_apart():
    colours = torch.tensor(maps.class_colours(20)).float()
    assert torch.cdist(colours, colours).add(torch.eye(20) * 1e3).min() > 20 and len(set(maps.class_colours(150))) > 120


def change_nothing(root):
    pass


def remove_a_map(root):
    (root / "annotations/training/001.png").unlink()


def remove_a_picture(root):
    (root / "images/training/001.png").unlink()


def add_a_second(root):
    save_noise(root / "images/training/001.jpg", (48, 48))


def in_colours(root):
    save_noise(root / "annotations/training/001.png", (48, 48))


def of_another_size(root):
    Image.new("L", (40, 48)).save(root / "annotations/training/001.png")


def beyond_the_classes(root):
    Image.new("L", (48, 48), 77).save(root / "annotations/training/001.png")


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove_a_map, "1 picture without a counterpart, {root}/images/training/001.png for one; add it to"),
        (remove_a_picture, "1 label map without a counterpart, {root}/annotations/training/001.png for one; add it to"),
        (add_a_second, "{root}/images/training/001 is there with more than one suffix"),
        (in_colours, "{root}/annotations/training/001.png is a picture in colours (RGB), not a map of labels"),
        (of_another_size, "001.png is 48 x 48 pixels, its labels {root}/annotations/training/001.png 40 x 48"),
        (beyond_the_classes, "{root}/annotations/training/001.png has the label 77, but the 11 classes have 0 to 10"),
    ],
)
def test_data_that_do_not_fit_get_one_line(folder, tmp_path, capsys, change, message, workers):
    change(folder)
    argv = words(data_path=folder, output_dir=tmp_path / "run", **SMALL | dict(num_workers=workers))
    with pytest.raises(SystemExit) as exit:
        run_script(segment.main, lambda: segment.get_args(argv))
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert exit.value.code == 2 and message.format(root=folder) in said and "Traceback" not in said


def test_an_unreadable_picture_or_map_is_replaced_and_named(folder, tmp_path, capsys):
    (folder / "images/training/001.png").write_text("no picture")
    (folder / "annotations/training/003.png").write_text("no map")
    (folder / "images/validation/002.png").write_text("no picture")
    run(folder, tmp_path / "run", epochs=1)
    errors = capsys.readouterr().err
    assert "images/training/001.png (not an image" in errors and "annotations/training/003.png: not an image" in errors
    assert json.loads((tmp_path / "run/scores.json").read_text())["images"] == 2
    assert read_log(tmp_path / "run")[-2]["unreadable_images"] == 2


# --- transforms -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(60, 80), (200, 90)])
def test_labels_follow_their_picture(size):
    """A white rectangle on black is class 1: wherever it comes to lie, the labels say so, and what is padded is not counted."""
    labels = np.zeros(size, dtype=np.uint8)
    labels[20:50, 10:40] = 1
    picture = Image.fromarray(np.repeat(255 * labels[..., None], 3, axis=2))
    transform, seen = maps.augmentation(64, 60, (0.5, 2.0), 1.0, False), set()
    for seed in range(20):
        torch.manual_seed(seed)
        found, cropped = transform(picture, tv_tensors.Mask(torch.from_numpy(labels)))
        found, cropped = v2.functional.pil_to_tensor(found), cropped.as_subclass(torch.Tensor)
        assert found.shape == (3, 64, 64) and cropped.shape == (64, 64) and cropped.dtype == torch.uint8
        grey = (found == torch.tensor(maps.GREY)[:, None, None]).all(dim=0)
        assert torch.equal(grey, cropped == 255)  # padding
        edges = (F.max_pool2d(found[:1].float(), 3, 1, 1) - -F.max_pool2d(-found[:1].float(), 3, 1, 1))[0] > 0
        assert ((found[0] > 127) == (cropped == 1))[~edges & (cropped != 255)].all()  # exact but where the picture is blurred
        seen |= set(cropped.unique().tolist())
    assert seen == {0, 1, 255}


def test_labels_are_not_shifted_when_they_are_resized():
    """A half plane, shrunk: the border between the labels is where the picture crosses its middle grey, to half a pixel."""
    labels = np.zeros((90, 90), dtype=np.uint8)
    labels[:, 40:] = 1
    picture = Image.fromarray(np.repeat(255 * labels[..., None], 3, axis=2))
    for short in range(20, 90, 3):
        small, resized = maps.RandomScale(short, (1, 1))(picture, tv_tensors.Mask(torch.from_numpy(labels)))
        brightness = v2.functional.pil_to_tensor(small)[0, 0].float().sum() / 255  # how many pixels are right of the border
        assert abs(resized[0].sum() - brightness) <= 0.51


def test_crops_have_no_more_of_one_class_than_allowed():
    labels = torch.zeros(100, 100, dtype=torch.uint8)
    labels[:30, :30] = 1
    shares = {}
    for most in (1.0, 0.75):
        crop, shares[most] = maps.LimitedCrop(32, most), []
        for seed in range(60):
            torch.manual_seed(seed)
            _, found = crop(Image.new("RGB", (100, 100)), tv_tensors.Mask(labels))
            shares[most].append(max((found == k).float().mean().item() for k in (0, 1)))
    above = {most: sum(share > 0.75 for share in values) for most, values in shares.items()}
    assert above[1.0] > 50 and above[0.75] < 40  # of ten tries, some find none


def test_what_is_drawn_for_a_sample_depends_on_its_place_alone(folder):
    def load():
        classes = maps.find_classes(folder, None, None, False)[:2]
        return maps.folder_maps(folder, "training", classes, maps.augmentation(32, 40, (0.5, 2), 0.75, True), 3)

    first, second = load(), load()
    first[0, 1]
    (a, x, _), (b, y, _) = first[1, 2], second[1, 2]
    assert torch.equal(a, b) and torch.equal(x, y) and not torch.equal(first[2, 2][0], a)


# --- evaluation -------------------------------------------------------------------------------------------------------


def test_scores_are_those_of_a_plain_loop():
    rng = np.random.default_rng(0)
    truth, found = rng.integers(0, 6, (3, 20, 30)), rng.integers(0, 6, (3, 20, 30))
    truth[truth == 5], found[found == 4] = 255, 3  # 4 is never predicted, 5 never true but predicted
    confusion = torch.zeros(7, 7, dtype=torch.int64)
    for t, p in zip(truth.flatten(), found.flatten()):
        if t != 255:
            confusion[t, p] += 1
    scores = segmentation_scores(confusion, list("abcdefg"))
    counted = truth != 255
    for k, name in enumerate("abcdefg"):
        either = (((truth == k) | (found == k)) & counted).sum()
        both = ((truth == k) & (found == k) & counted).sum()
        assert scores["IoU_by_class"][name] == (both / either if either else None)
    present = [value for value in scores["IoU_by_class"].values() if value is not None]
    assert len(present) == 6 and scores["mIoU"] == pytest.approx(sum(present) / 6, abs=1e-15)
    assert scores["accuracy"] == ((truth == found) & counted).sum() / counted.sum()
    accuracies = [(found[truth == k] == k).mean() for k in range(5)]
    assert scores["mean_accuracy"] == pytest.approx(sum(accuracies) / 5, abs=1e-15)


class Lookup(torch.nn.Module):
    """A segmenter whose logits are a fixed function of each pixel and of its window's mean."""

    encoder = ConvNeXt(**TINY, num_classes=0, stem_stride=1)

    def forward(self, imgs):
        mean = imgs.mean(dim=(1, 2, 3), keepdim=True)
        return torch.cat([imgs[:, :1] * 2, imgs[:, 1:2] - mean, (imgs * mean).sum(dim=1, keepdim=True)], dim=1)


def test_the_score_of_an_evaluation_is_another_librarys(folder):
    torchmetrics = pytest.importorskip("torchmetrics")
    args = segment.get_args(words(data_path=folder, **SMALL | dict(test_size=48)))
    val = segment.load_maps(args, "val", maps.find_classes(folder, None, None, False)[:2])
    network = trained(UPerNet(small_network(num_classes=0, stem_stride=2), 11, 8, 8))
    scores, shown = segment.evaluate(network, val, args, ALONE)
    metric = torchmetrics.JaccardIndex("multiclass", num_classes=11, average="none", ignore_index=255)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in STATISTICS["folder"])
    for index in range(3):
        picture, truth = val.open(index)
        with torch.no_grad():
            found = network(((v2.functional.pil_to_tensor(picture) / 255 - mean) / std)[None]).argmax(dim=1)
        assert (shown[index] == found[0].numpy()).all()
        metric.update(found, torch.from_numpy(truth)[None].long())
    theirs = metric.compute()
    ours = [math.nan if value is None else value for value in scores["IoU_by_class"].values()]
    occurs = [k for k in range(11) if not math.isnan(ours[k])]  # theirs has 0 for a class that is nowhere
    assert [ours[k] for k in occurs] == pytest.approx(theirs[occurs].tolist(), abs=1e-6) and scores["images"] == 3


@pytest.mark.parametrize(
    ("size", "window", "stride"), [((50, 70), 32, 20), ((32, 32), 32, 20), ((20, 75), 32, 32), ((64, 64), 32, 7)]
)
def test_sliding_windows_are_a_plain_loop(size, window, stride):
    imgs = torch.randn(1, 3, *size)
    found = segment.slide(Lookup(), imgs, window, stride)
    total, times = torch.zeros(1, 3, *size), torch.zeros(size)
    for row in range(max(math.ceil((size[0] - window) / stride), 0) + 1):  # as OpenMMLab counts and places them
        for column in range(max(math.ceil((size[1] - window) / stride), 0) + 1):
            bottom, right = min(row * stride + window, size[0]), min(column * stride + window, size[1])
            top, left = max(bottom - window, 0), max(right - window, 0)
            total[:, :, top:bottom, left:right] += Lookup()(imgs[:, :, top:bottom, left:right])
            times[top:bottom, left:right] += 1
    assert times.min() >= 1
    torch.testing.assert_close(found, total / times)


def test_scales_and_mirroring_are_a_plain_loop():
    args = segment.get_args(words(test_size=40, test_scales=(0.5, 1, 1.5), flip=True, window=32, stride=16, stem_stride=1))
    picture = torch.randint(256, (3, 50, 60), dtype=torch.uint8)
    found = segment.probabilities(Lookup(), picture, args)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in STATISTICS["embedded"])
    total = torch.zeros(3, 50, 60)
    for scale, flip in product((0.5, 1, 1.5), (False, True)):
        size = [round(40 * scale), round(48 * scale)]
        view = F.interpolate(picture[None].float(), size, mode="bilinear", antialias=True).round() / 255
        view = ((view - mean) / std).flip(3) if flip else (view - mean) / std
        logits = segment.slide(Lookup(), view, 32, 16)
        logits = logits.flip(3) if flip else logits
        total += F.interpolate(logits, (50, 60), mode="bilinear")[0].softmax(dim=0) / 6
    torch.testing.assert_close(found, total, atol=1e-2, rtol=0)  # resized pictures are bytes, which may round otherwise
    assert found.sum(dim=0).sub(1).abs().max() < 1e-5


# --- training ---------------------------------------------------------------------------------------------------------


def test_training_is_a_plain_loop(folder, tmp_path):
    """Three updates of two pictures: the two losses, AdamW, a rate that rises linearly and falls by a power."""
    flags = dict(seed=5, epochs=1, lr=2e-3, warmup_updates=1, power=2.0, layer_decay=0.8, weight_decay=0.1, min_lr=1e-4)
    found = run(folder, tmp_path / "run", disable_eval=True, **flags)

    args = segment.get_args(words(data_path=folder, **SMALL | flags))
    transform = maps.augmentation(32, 40, (0.5, 2.0), 0.75, True)
    data = maps.folder_maps(folder, "training", maps.find_classes(folder, None, None, False)[:2], transform, 5)
    torch.manual_seed(5)
    net = segment.make_segmenter(args, 11).train().to(memory_format=torch.channels_last)
    start = {name: value.clone() for name, value in net.state_dict().items()}
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in STATISTICS["folder"])
    moments, losses, rates = {}, [], []
    order = torch.randperm(6, generator=torch.Generator().manual_seed(mix_seed("order", 5, 0))).tolist()
    for update in range(3):
        items = [data[0, index] for index in order[2 * update : 2 * update + 2]]
        imgs, labels = (
            torch.stack([(picture / 255 - mean) / std for picture, *_ in items]),
            torch.stack([each[1] for each in items]),
        )
        torch.manual_seed(mix_seed("step", 5, 0, update, 0))
        head, auxiliary = (
            F.cross_entropy(logits, labels.long(), ignore_index=255)
            for logits in net(imgs.contiguous(memory_format=torch.channels_last))
        )
        losses.append((head.item(), 0.4 * auxiliary.item()))
        rate = 2e-3 / 2 if update == 0 else 1e-4 + (2e-3 - 1e-4) * ((3 - update) / 2) ** 2
        rates.append(rate)
        names = [name for name, _ in net.named_parameters()]
        gradients = dict(zip(names, torch.autograd.grad(head + 0.4 * auxiliary, list(net.parameters()))))
        for name, parameter in net.named_parameters():
            inner = name.removeprefix("encoder.").split(".")
            layer = {"downsample_layers": (0, 2, 3, 4), "stages": (1, 2, 3, 4)}.get(inner[0], [5] * 4)[
                int(inner[1]) if inner[1].isdigit() else 0
            ]
            lr = rate * 0.8 ** (5 - layer)
            m, v = moments.get(name, (0, 0))
            m, v = 0.9 * m + 0.1 * gradients[name], 0.999 * v + 0.001 * gradients[name] ** 2
            moments[name] = m, v
            with torch.no_grad():
                if parameter.ndim > 1 and not name.endswith((".gamma", ".beta")):
                    parameter *= 1 - lr * 0.1
                parameter -= lr * (m / (1 - 0.9 ** (update + 1))) / ((v / (1 - 0.999 ** (update + 1))).sqrt() + 1e-8)
    for record, expected in zip(read_log(tmp_path / "run"), losses):
        assert (record["loss_head"], record["loss_auxiliary"]) == pytest.approx(expected, abs=1e-4)
        assert record["loss"] == pytest.approx(sum(expected), abs=2e-4)
        assert record["lr"] == pytest.approx(rates[record["update"] - 1])
    moved = {name: value - start[name] for name, value in net.state_dict().items() if value.is_floating_point()}
    for names in (gradients.keys(), moved.keys() - gradients.keys()):  # parameters; BatchNorm's statistics, which move much farther
        far = sum((moved[name] - (found["model"][name] - start[name])).norm() ** 2 for name in names).sqrt()
        assert far < 0.01 * sum(moved[name].norm() ** 2 for name in names).sqrt()


def test_a_stopped_run_continues_bit_for_bit(folder, tmp_path, monkeypatch):
    flags = dict(save_every_steps=1, model_ema=True, drop_path=0.3, amp="none", iterations=5, epochs=None)
    whole = run(folder, tmp_path / "whole", **flags)
    with monkeypatch.context() as patch:
        call_at(patch, segment.Run, "backward", 4)
        with pytest.raises(KeyboardInterrupt):
            run(folder, tmp_path / "parts", **flags)
    parts = run(folder, tmp_path / "parts", **flags)
    assert_equal(parts["model"], whole["model"])
    assert_equal(parts["model_ema"], whole["model_ema"])
    logs = [stress.untimed(read_log(tmp_path / name)) for name in ("whole", "parts")]
    assert logs[0] == logs[1] and [row["update"] for row in logs[0] if "lr" in row] == [1, 2, 3, 4, 5]


def test_two_processes_train_and_evaluate_as_one_with_twice_the_batch(folder, tmp_path):
    # Without dropout, which draws in each process for itself.
    flags = dict(epochs=1, warmup_updates=0, opt="sgd", lr=1e-2, log_every=1)

    def main(name, batch):
        segment.main(
            segment.get_args(words(data_path=folder, output_dir=tmp_path / name, **SMALL | flags | dict(batch_size=batch)))
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segment, "UPerNet", partial(UPerNet, dropout=0.0))
        patch.setattr(segment, "segmentation_losses", lambda head, aux, labels, _: segmentation_losses(head, aux, labels % 11))
        main("one", 4)
        stress.wait(stress.fork(lambda: main("two", 2), tmp_path, 2))
    one, two = (load_file(find_checkpoints(tmp_path / name)[-1]) for name in ("one", "two"))
    assert_equal(two["model"], one["model"], rtol=2e-3, atol=2e-4)
    scores = [json.loads((tmp_path / name / "scores.json").read_text()) for name in ("one", "two")]
    assert scores[0]["images"] == scores[1]["images"] == 3 and scores[0]["mIoU"] == pytest.approx(scores[1]["mIoU"], abs=0.02)


def test_a_batch_of_one_is_refused_with_the_reason(folder, tmp_path):
    with pytest.raises(UserError, match="--batch_size 1 in one process: BatchNorm after the 1 x 1 pool"):
        run(folder, tmp_path / "run", batch_size=1)


def test_weights_come_from_encoders_classifiers_and_segmenters(folder, tmp_path):
    classifier = randomised(MODELS["convnextv2_atto"](num_classes=7, stem_stride=2))
    save_tensors(tmp_path / "classifier.pth", {"model": classifier.state_dict()})
    args = segment.get_args(words(data_path=folder, **SMALL | dict(stem_stride=None), finetune=tmp_path / "classifier.pth"))
    assert args.stem_stride == 2 and args.model.startswith("convnextv2")
    segmenter = segment.make_segmenter(args, 11)
    layouts.load_parts(segmenter, segmenter.encoder, args.finetune, "segmenter")
    encoder = {name: value for name, value in classifier.state_dict().items() if not name.startswith(("norm.", "head."))}
    assert_equal(segmenter.encoder.state_dict(), encoder)

    save_tensors(tmp_path / "segmenter.pth", {"model": trained(segmenter).state_dict()})
    another = segment.make_segmenter(args, 4)
    lines = "\n".join(layouts.load_parts(another, another.encoder, tmp_path / "segmenter.pth", "segmenter"))
    assert "at their initial values: auxiliary.1, classifier" in lines and "tensors of the segmenter are left out" in lines
    kept = {name: value for name, value in segmenter.state_dict().items() if not name.startswith(("classifier.", "auxiliary.1."))}
    assert_equal({name: another.state_dict()[name] for name in kept}, kept)


def test_evaluation_and_prediction_take_the_network_from_the_checkpoint(folder, tmp_path, capsys):
    (folder / "classes.txt").write_text("\n".join(f"{name} {9 * k} {k} 250" for k, name in enumerate(["ground", *SHAPES])))
    run(folder, tmp_path / "run", epochs=1)
    best, where = tmp_path / "run/checkpoint-best.pth", dict(output_dir=tmp_path / "again", device="cpu", num_workers=0)
    scores = json.loads((tmp_path / "run/scores.json").read_text())
    segment.main(segment.get_args(["--eval", *words(resume=best, **where)]))
    assert json.loads((tmp_path / "again/scores.json").read_text()) == scores and "on 3 images of" in capsys.readouterr().out

    save_noise(tmp_path / "pictures/a.png", (70, 50))
    save_noise(tmp_path / "pictures/sub/b.jpg", (50, 170))
    (tmp_path / "pictures/c.png").write_text("no picture")
    segment.main(segment.get_args(["--predict", str(tmp_path / "pictures"), *words(resume=best, **where)]))
    folder = tmp_path / "again/predictions"
    assert sorted(path.name for path in folder.iterdir()) == [
        "00000-a-overlay.png",
        "00000-a.png",
        "00002-b-overlay.png",
        "00002-b.png",
    ]
    segmenters, classes, colours = segment.load_segmenters(
        best, args := segment.get_args(["--eval", *words(resume=best)]), ALONE.device
    )
    for name, file in (("00000-a.png", "a.png"), ("00002-b.png", "sub/b.jpg")):
        picture = v2.functional.pil_to_tensor(Image.open(tmp_path / "pictures" / file))
        with torch.no_grad():
            expected = segment.probabilities(segmenters["model"], picture, args).argmax(dim=0)
        written = Image.open(folder / name)
        assert (np.asarray(written) == expected.numpy()).all() and written.getpalette()[3:6] == [9, 1, 250] == list(colours[1])
    assert classes == ["ground", *SHAPES]


def test_other_classes_than_those_trained_are_refused(folder, tmp_path):
    run(folder, tmp_path / "run", epochs=1)
    argv = ["--eval", *words(resume=tmp_path / "run", output_dir=tmp_path / "again", device="cpu", num_workers=0)]
    (folder / "classes.txt").write_text("\n".join(reversed(["ground", *SHAPES])))
    with pytest.raises(UserError, match="classes are ground, disc, .*, the validation data's spiral, heart"):
        segment.main(segment.get_args(argv))
    (folder / "names.txt").write_text("\n".join(["ground", *SHAPES]))
    segment.main(segment.get_args([*argv, "--classes", str(folder / "names.txt")]))


def test_flags_of_evaluation_reach_it(folder, tmp_path):
    run(folder, tmp_path / "run", epochs=1)
    write_maps(folder, "test", 3, seed=9)
    write_maps(tmp_path / "other", "validation", 3, seed=9)
    segment.load_segmenters(
        best := tmp_path / "run/checkpoint-best.pth", segment.get_args(["--eval", *words(resume=best)]), ALONE.device
    )

    def found(**flags) -> str:
        args = segment.get_args(
            ["--eval", *words(resume=best, output_dir=tmp_path / "again", device="cpu", num_workers=0, **flags)]
        )
        network = segment.load_segmenters(best, args, ALONE.device)[0]["model"]
        val, seen = segment.load_maps(args, "val", (["ground", *SHAPES], maps.class_colours(11))), []
        for index in range(len(val)):
            picture = v2.functional.pil_to_tensor(val.open(index)[0])
            seen.append(segment.probabilities(network, picture, args))
        return torch.stack(seen).detach()

    plain = found()
    for flags in (
        dict(test_size=60), dict(test_scales=(0.75, 1)), dict(flip=True), dict(window=24), dict(val_split="test"),
        dict(data_path=tmp_path / "other"),
    ):  # fmt: skip
        assert not torch.equal(found(**flags), plain), flags
    assert not torch.equal(found(window=24, stride=5), found(window=24)) and torch.equal(found(), plain)
    assert torch.equal(found(val_split="test"), found(val_split="test", data_path=folder))  # the checkpoint's folder


def test_the_embedded_pictures_are_segmented_and_shown(tmp_path, monkeypatch, drawn):
    monkeypatch.setattr(maps, "draw_scenes", lambda count, seed, size: draw_scenes(10, seed, size))
    run(None, tmp_path / "run", epochs=1, data_set="embedded")
    assert json.loads((tmp_path / "run/config.json").read_text())["images"] == 10
    assert all(Image.open(tmp_path / f"run/{name}.png").width > 400 for name in ("segmentation", "scores"))
    for more in ([], ["--data_path", "ade"]):  # other pictures are normalised as the training's were
        assert segment.get_args(["--eval", "--resume", str(tmp_path / "run"), *more]).statistics == "embedded"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--eval"], "--eval needs --resume FILE"),
        (["--predict", "a.png"], "--predict needs --resume FILE"),
        (["--data_set", "folder"], "--data_set folder needs --data_path DIR, in the layout of ADE20K"),
        (["--recipe", "ade20k"], "has no settings for size atto"),
        (["--scale", "2", "1"], "the larger factor comes second"),
        (["--window", "64", "--stride", "65"], "--stride 65 leaves gaps between windows of --window 64"),
        (["--stride", "65"], "--stride 65 is of sliding windows; give --window too"),
        (["--window", "8"], "image size 8 x 8 is below the patch size 16"),
        (["--data_path", "nowhere", "--nb_classes", "3"], "the folder nowhere/images/training does not exist"),
        (["--data_path", "nowhere", "--classes", "nowhere.txt"], "cannot read the classes nowhere.txt"),
    ],
)
def test_mistakes_get_one_line(flags, message, capsys, tmp_path):
    with pytest.raises((UserError, SystemExit)) as caught:
        segment.main(segment.get_args([*flags, "--output_dir", str(tmp_path / "run"), "--device", "cpu"]))
    said = str(caught.value) if caught.type is UserError else capsys.readouterr().err
    assert message in said and len(said.strip().splitlines()) == 1


def test_a_classifiers_or_detectors_checkpoint_is_no_segmenter(tmp_path):
    for extra in ({}, {"classes": ["a"], "category_ids": [1]}):
        save_tensors(tmp_path / "c.pth", {"model": MODELS["convnextv2_atto"](num_classes=3).state_dict()} | extra)
        argv = ["--predict", str(tmp_path), "--resume", str(tmp_path / "c.pth"), "--output_dir", str(tmp_path / "o")]
        with pytest.raises(UserError, match="holds no segmenter of segment.py"):
            segment.main(segment.get_args(argv))


def test_the_recipe_is_the_published_one():
    args = segment.get_args(["--recipe", "ade20k", "--model", "convnextv2_base", "--data_path", "ade"])
    expected = dict(
        lr=None, blr=1.6e-3, iterations=160_000, warmup_updates=1500, power=1.0, layer_decay=0.9, drop_path=0.3, input_size=512
    )
    expected |= dict(weight_decay=0.05, channels=512, aux_channels=256, scale=(0.5, 2.0), most=0.75, images_per_update=16)
    assert {name: getattr(args, name) for name in expected} == expected and args.reduce_zero_label and args.photometric
    assert 8 * args.batch_size == 16 and math.isclose(args.blr * 16 / 256, 1e-4) and args.layer_decay_type == "group"


@pytest.mark.slow
def test_eight_pictures_are_learned_by_heart(tmp_path):
    for split in ("training", "validation"):
        write_maps(tmp_path / "ade", split, 8, 0, size=64)
    flags = dict(input_size=64, test_size=64, stem_stride=1, channels=32, aux_channels=16, batch_size=4, lr=3e-3)
    more = dict(scale=(1, 1), most=1, photometric=False, epochs=500, eval_freq=250, log_every=100, save_ckpt_freq=500)
    run(tmp_path / "ade", tmp_path / "run", **flags, **more)
    assert json.loads((tmp_path / "run/scores.json").read_text())["mIoU"] > 0.9
