"""Claims about segment.py and plumbing/maps.py, each against something independent."""

import json
import math
import re
from contextlib import nullcontext
from copy import deepcopy
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import helpers
import numpy as np
import pytest
import stress
import torch
import torch.nn.functional as F
from helpers import CPU, TINY, assert_equal, call_at, layer_groups, log_of, randomised, read_log, save_noise, words
from PIL import Image, ImageOps
from torchvision import tv_tensors
from torchvision.transforms import v2

import segment
import weights
from data import GREY, STATISTICS
from model import ConvNeXt
from plumbing import maps, tasks
from plumbing.files import UserError, find_checkpoints, load_file, save_tensors
from plumbing.loading import mix_seed
from plumbing.shapes import SHAPES, draw_scenes
from segment import Augmentation, UPerNet, segmentation_losses

pytestmark = pytest.mark.usefixtures("small_models")
SMALL = dict(input_size=32, test_size=40, stem_stride=2, channels=8, aux_channels=8, batch_size=2, epochs=2, lr=1e-3)
helpers.FLAGS[segment] = SMALL | dict(eval_freq=1, num_workers=0, log_every=1, device="cpu")
run = partial(helpers.run, segment)
NAMES = ["ground", *SHAPES]
MEAN, STD = (torch.tensor(values).view(3, 1, 1) for values in STATISTICS["folder"])
small_encoder = partial(ConvNeXt, **TINY, num_classes=0)


@pytest.fixture
def folder(tmp_path) -> Path:
    for split, count in (("training", 6), ("validation", 3)):
        helpers.write_maps(tmp_path / "ade", split, count, seed=len(split))
    return tmp_path / "ade"


def arguments(data_path, *more: str, **flags):
    return segment.get_args([*more, *words(data_path=data_path, **helpers.FLAGS[segment] | flags)])


def scores_in(directory) -> dict:
    return json.loads((directory / "scores.json").read_text())


def pixels(file) -> torch.Tensor:
    image = Image.open(file) if isinstance(file, Path) else file
    return v2.functional.pil_to_tensor(ImageOps.exif_transpose(image))


# --- the network ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nets(tmp_path_factory) -> tuple:
    """transformers' UPerNet, its weights and statistics drawn at random, and ours with the same, by way of a file."""
    transformers, path = pytest.importorskip("transformers"), tmp_path_factory.mktemp("theirs") / "upernet.pth"
    sizes = dict(depths=[1, 1, 2, 1], hidden_sizes=[8, 16, 32, 64], out_indices=[1, 2, 3, 4])
    widths = dict(hidden_size=16, auxiliary_channels=8, auxiliary_in_channels=32)
    config = transformers.UperNetConfig(backbone_config=transformers.ConvNextV2Config(**sizes), **widths, num_labels=5)
    theirs = randomised(transformers.UperNetForSemanticSegmentation(config)).train()
    theirs(torch.randn(4, 3, 64, 64))  # its statistics are no longer 0 and 1
    ours = UPerNet(small_encoder(), 5, 16, 8).eval()
    save_tensors(path, theirs.eval().state_dict())
    assert "initial" not in weights.load_parts(ours, ours.encoder, path, "segmenter")[-1]
    return theirs, ours


@torch.no_grad()
@pytest.mark.parametrize("shape", [(2, 3, 64, 64), (1, 3, 97, 130), (3, 3, 70, 64)])
def test_logits_are_those_of_transformers_on_the_same_weights(nets, shape):
    imgs = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected, logits = nets[0](imgs).logits, nets[1](imgs)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_losses_and_gradients_are_those_of_transformers_in_training(nets):
    theirs, ours = (deepcopy(net).double() for net in nets)  # in float32 a ReLU may see another sign
    imgs, labels = torch.randn(3, 3, 64, 96, dtype=torch.float64), torch.randint(5, (3, 64, 96))
    labels[:, :9] = 255
    ours.train().dropout.eval()  # theirs has none
    loss, expected = sum(segmentation_losses(*ours(imgs), labels).values()), theirs.train()(imgs, labels=labels).loss
    (loss + expected).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    gradients = weights.upernet_names({name: p.grad for name, p in theirs.named_parameters()})
    for name, parameter in ours.named_parameters():
        gradient = gradients[name].reshape(parameter.shape)
        torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=1e-6 * gradient.abs().max().item() + 1e-9)


def test_dropout_takes_whole_channels_before_both_classifiers():
    net, inputs = UPerNet(small_encoder(), 5, 64, 64, dropout=0.5).train(), []
    for classifier in (net.classifier, net.auxiliary[1]):
        classifier.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    net(torch.randn(2, 3, 128, 128, generator=torch.Generator().manual_seed(0)))
    dropped = [(features == 0).all(dim=(2, 3)).double().mean().item() for features in inputs]
    assert dropped == pytest.approx([0.5, 0.5], abs=0.15)


def test_parameters_are_as_many_as_the_published_segmenters():
    with torch.device("meta"):
        segmenter = UPerNet(ConvNeXt((3, 3, 9, 3), (96, 192, 384, 768), num_classes=0), 150)
    assert sum(p.numel() for p in segmenter.parameters()) == pytest.approx(60.29e6, abs=0.01e6)


def test_losses_are_means_over_the_pixels_that_count_weighted_by_class():
    torch.manual_seed(0)
    outputs, labels = torch.randn(2, 2, 3, 4, 5), torch.randint(3, (2, 4, 5))
    labels[0, :2], factors = 255, torch.tensor([0.2, 1.0, 5.0])
    losses = segmentation_losses(*outputs, labels.to(torch.uint8), factors)
    for name, logits, weight in zip(("loss_head", "loss_auxiliary"), outputs, (1, 0.4)):
        rows, counted = logits.movedim(1, 3).log_softmax(dim=3)[labels != 255], labels[labels != 255]
        mean = -(factors * F.one_hot(counted, 3) * rows).sum() / len(counted)
        assert losses[name].item() == pytest.approx(weight * mean.item(), rel=1e-5)
    assert not any(segmentation_losses(*outputs, torch.full_like(labels, 255)).values())


# --- label maps -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "dtype"), [("P", "uint8"), ("L", "uint8"), ("I;16", "uint16"), ("I", "int32")])
def test_label_maps_of_every_kind_are_read_alike(tmp_path, mode, dtype):
    labels, written = np.array([[0, 1, 2], [3, 255, 1]]), tmp_path / "written.png"
    image, file = Image.fromarray(labels.astype(dtype)), tmp_path / ("labels.tif" if mode == "I" else "labels.png")
    if mode == "P":
        image.putpalette([17, 34, 51] * 256)  # colours mean nothing
    image.save(file)
    assert Image.open(file).mode == mode
    without_zero, two = [[255, 0, 1], [2, 255, 0]], [[0, 255, 255], [255, 1, 255]]
    for numbers, expected in ((range(4), labels), (range(1, 4), without_zero), ([0, 255], two)):
        assert (maps.read_labels(file, numbers) == expected).all()
        classes = np.arange(len(numbers), dtype=np.uint8)[None]
        maps.write_labels(written, classes, maps.Classes([], [(9, 8, 7)] * len(numbers), numbers))
        assert (maps.read_labels(written, numbers) == classes).all()
        assert Image.open(written).convert("RGB").getcolors() == [(len(numbers), (9, 8, 7))]


LISTS = {
    "sky 70 130 180\ntraffic light, 250, 170, 30\n": (["sky", "traffic light"], [(70, 130, 180), (250, 170, 30)]),
    "\ufeffsky\n\n# a comment\ntraffic light\n": (["sky", "traffic light"], maps.class_colours(2)),
    "Idx\tRatio\tStuff\tName\n1\t0.1\t1\twall\n2\t0.1\t1\ta, b\n": (["wall", "a, b"], maps.class_colours(2)),
} | {"": "names 0 classes", "a\nb\na": "names 3 classes, 2 different", "a 1 2 300": "end at 255"}


@pytest.mark.parametrize(("text", "expected"), LISTS.items())
def test_classes_are_read_from_every_kind_of_list(tmp_path, text, expected):
    (tmp_path / "classes.txt").write_text(text)
    with pytest.raises(UserError, match=expected) if isinstance(expected, str) else nullcontext():
        assert maps.read_classes(tmp_path / "classes.txt") == expected


def test_without_names_there_are_as_many_classes_as_in_the_training_maps(folder):
    (folder / "classes.txt").unlink()
    (folder / "annotations/training/001.png").write_text("no map")
    seen = segment.load_images(arguments(folder), "train").pixels
    largest = max(np.asarray(Image.open(path)).max() for path in folder.glob("annotations/training/00[02-9].png"))
    names, colours, numbers = segment.find_classes(arguments(folder), seen)
    assert len(names) == len(set(colours)) == len(numbers) == largest + 1 and names[1] == "class 1"
    assert segment.find_classes(arguments(folder, reduce_zero_label=True), seen).numbers == range(1, largest + 1)
    assert len(segment.find_classes(arguments(folder, nb_classes=40), {0, 3}).names) == 40  # no mask of two values
    colours = torch.tensor(maps.class_colours(20)).float()  # can be told apart
    assert torch.cdist(colours, colours).add(torch.eye(20) * 1e3).min() > 20 and len(set(maps.class_colours(150))) > 120


def test_overlays_are_tinted_errors_red_and_the_ten_largest_classes_in_the_legend(tmp_path, monkeypatch):
    drawn, classes = [], maps.Classes([f"c{k}" for k in range(30)], maps.class_colours(30), range(30))
    monkeypatch.setattr(maps, "plot_panels", lambda path, panels, *_, legend, **__: drawn.extend([panels, [*legend]]))
    monkeypatch.setattr(maps, "scaled", lambda example, side: example)
    labels = torch.arange(30).repeat_interleave(torch.arange(30) + 1).to(torch.uint8)[None]  # of label k, k + 1
    labels[0, 0] = 255
    maps.draw_overlay(tmp_path / "a.png", torch.full((3, *labels.shape), 100, dtype=torch.uint8), labels, classes)
    assert drawn[1] == [f"c{k}" for k in range(20, 30)] + ["ignored"]
    tint = torch.tensor([(0, 0, 0), classes.colours[1], classes.colours[1]]).T[:, None]
    assert torch.equal((255 * drawn[0]["labels"][0, :, :, :3]).round(), (40 + 0.6 * tint).round())
    marked = maps.mark_errors(torch.full((3, 1, 3), 100), torch.tensor([[1, 1, 255]]), torch.tensor([[1, 0, 0]]))
    assert marked[:, 0].T.tolist() == [[195] * 3, [214, 39, 40], [0, 0, 0]]  # the last one does not count


def relabel(root: Path, change, mode: str | None = None) -> None:
    """Replace every label map by the array `change(labels)`, in a file of the same name, and of another `mode`."""
    for path in root.glob("annotations/*/*.png"):
        labels = np.asarray(change(np.asarray(Image.open(path)).astype(int)))
        bits = "uint8" if labels.max() < 256 else "uint16" if labels.max() < 65536 else "int32"
        image = Image.fromarray(labels.astype(bits))
        image.convert(mode or image.mode).save(path, format="TIFF" if bits == "int32" else "PNG")


KINDS = [(255, "L"), (128, "L"), (65535, "I;16"), (255, "RGB"), (255, "LA")]  # value of the one class, file's mode
LISTED = {"": ["background", "object"], "thing": ["background", "thing"], "nothing\nthing": ["nothing", "thing"]}


@pytest.mark.parametrize(("kind", "listed"), [*product(KINDS, [""]), *product(KINDS[:1], LISTED)])
def test_maps_of_two_values_are_background_and_one_class(folder, kind, listed, capsys):
    value, mode = kind
    masks = np.stack([np.asarray(Image.open(path)) > 0 for path in sorted(folder.glob("annotations/validation/*"))])
    (folder / "classes.txt").write_text(listed) if listed else (folder / "classes.txt").unlink()
    relabel(folder, lambda labels: value * (labels > 0), mode)
    images = segment.load_images(arguments(folder), "val")
    classes = segment.find_classes(arguments(folder), images.pixels)
    fractions = segment.use_classes(images, classes, least=2) / sum(images.pixels.values())
    assert (np.stack([images[0, index][1] for index in range(3)]) == masks).all()
    assert fractions[1].item() == pytest.approx(masks.mean()) and classes.names == LISTED[listed]
    assert f"0 is the background, {value} the" in capsys.readouterr().out


REFUSED = {  # message -> what is changed in a folder of six training maps and six classes, and flags
    "--stride 65 is larger than --window 64: it leaves gaps": dict(window=64, stride=65),
    "image size 8 x 8 is below the patch size 16": dict(window=8),
    "--classes contradicts --nb_classes": dict(classes="a.txt", nb_classes=3),
    "the folder images/training does not exist; .* --holdout 0.2": dict(data_path=None, holdout=0.2),
    "6 training images and --batch_size 1; BatchNorm needs at least 2": dict(batch_size=1),
    "1 training images and --batch_size 2; BatchNorm": dict(removed="*/training/00[1-9].png"),
    "no partner .*/annotations/training/001.png": dict(removed="images/training/001.png"),
    "no partner .*/images/training/001.png": dict(removed="annotations/training/001.png"),
    "1 of 6 classes have pixels in 6 label maps of labels 1, 255,": dict(labels=lambda x: np.where(x, 1, 255)),
    "0 of 0 .* 255 and 0 does": dict(labels=lambda x: 255 * (x > 0), removed="classes.txt", reduce_zero_label=True),
    "has the label 6, but the 6 classes have 0 to 5; name all": dict(labels=lambda x: x + 1),
    "has the label 1, but the 1 classes have 0 to 0": dict(labels=lambda x: x > 0, names=["object"]),
    "255 labels up to 254": dict(labels=lambda x: np.arange(x.size).reshape(x.shape) % 255, removed="classes.txt"),
    "labels up to 300 without names": dict(labels=lambda x: np.where(x == 1, 300, x), removed="classes.txt"),
    "000.png is 48 x 48 pixels, and its label map .* 40 x 48; one of them was": dict(labels=lambda x: x[:, :40]),
    "none of 6 label maps can be read .* label map .mode RGB.; save": dict(labels=lambda x: np.dstack([x, x * 2, x])),
    "none of 6 .* label map .mode I.; .* 0 to 65535": dict(labels=lambda x: np.where(x, 65536, 0)),
    "the first class is __Background__; remove it": dict(names=["__Background__", *SHAPES], reduce_zero_label=True),
}


@pytest.mark.parametrize("message", REFUSED)
def test_mistakes_get_one_line_at_the_start(folder, message, capsys):
    changes = dict(labels=lambda x: x, names=NAMES, removed="nothing", data_path=folder) | REFUSED[message]
    relabel(folder, changes.pop("labels"))
    (folder / "classes.txt").write_text("\n".join(changes.pop("names")))
    for path in folder.glob(changes.pop("removed")):
        path.unlink()
    with pytest.raises(SystemExit) as caught:
        segment.main(arguments(**changes))
    line = str(caught.value) if caught.type is UserError else capsys.readouterr().err
    assert re.search(message, line) and len(line.strip().splitlines()) == 1


@pytest.mark.parametrize(("splits", "holdout"), [("train val", 0), ("train valid", 0), ("train val", 0.3), (".", 0.3)])
def test_splits_have_other_names_or_are_one_folder_with_a_holdout(tmp_path, splits, holdout):
    for split, count in zip(splits.split(), (6, 3)):
        helpers.write_maps(tmp_path, split, count, seed=count)
    args = arguments(tmp_path, holdout=holdout or None)
    train, val = (segment.load_images(args, split) for split in ("train", "val"))
    assert [path.replace("/images/", "/annotations/") for path in train.items] == train.labels
    expected = sorted(str(path) for path in (tmp_path / "images" / splits.split()[0]).glob("*.png"))
    assert sorted(train.items + val.items * bool(holdout)) == expected and len(val) == (2 if holdout else 3)


def test_what_was_seen_is_printed_and_what_cannot_be_read_is_named_replaced_and_counted(folder, tmp_path, capfd):
    relabel(folder, lambda labels: np.tile(np.repeat([1, 1, 3, 255], 12), (48, 1)))  # a quarter of each map
    save_noise(folder / "annotations/training/000.png", (48, 48))
    damaged = ["annotations/training/001.png", "images/training/002.png", "images/validation/002.png"]
    for path in damaged:
        (folder / path).write_text("neither an image nor a map")
    run(folder, tmp_path / "run", epochs=1, num_workers=1, class_balance=0.5)
    printed = capfd.readouterr()
    line = f"pixels: {NAMES[1]} 66.7%, {NAMES[3]} 33.3%; 25.0% do not count"
    empty = f"no training pixel of ground, {NAMES[2]}, {NAMES[4]}, {NAMES[5]} (4 in all)"
    assert f"{line}; {empty}\n" in printed.out
    warnings = sorted(line for line in printed.err.splitlines() if "cannot read" in line)
    assert len(warnings) == 4 and "images/training/000.png (" in warnings[0] and "is no label map" in warnings[0]
    assert all(f"{path}'" in warning for path, warning in zip(damaged, warnings[1:]))
    assert scores_in(tmp_path / "run")["images"] == 2 and log_of(tmp_path / "run", "unreadable_images")[-1] == 3


def test_weights_of_classes_are_powers_of_their_fractions():
    factors = tasks.class_weights(torch.tensor([32.0, 2, 0], dtype=torch.float64), 0.5)
    fractions = torch.tensor([32 / 34, 2 / 34, 1e-4])  # the last one stands for none
    torch.testing.assert_close(factors / factors[0], (fractions[0] / fractions).sqrt())
    assert (factors * fractions).sum().item() == pytest.approx(1, rel=1e-5)


def augmentation(input_size=32, test_size=32, scale=(1, 1), most=1.0, photometric=False) -> Augmentation:
    return Augmentation(SimpleNamespace(**locals()))


def white_where(labels: np.ndarray) -> tuple[Image.Image, tv_tensors.Mask]:
    labels = labels.astype(np.uint8)
    return Image.fromarray(np.repeat(255 * labels[..., None], 3, axis=2)), tv_tensors.Mask(torch.from_numpy(labels))


@pytest.mark.parametrize("size", [(60, 80), (200, 90)])
def test_labels_follow_their_image(size):
    """Wherever a white rectangle comes to lie, it has its label, and padding does not count."""
    labels = np.zeros(size)
    labels[20:50, 10:40] = 1
    torch.manual_seed(0)
    values = set()
    for _ in range(20):
        image, cropped = augmentation(64, 60, (0.5, 2.0))(*white_where(labels))
        image, cropped = pixels(image), cropped.as_subclass(torch.Tensor)
        assert image.shape == (3, 64, 64) and cropped.shape == (64, 64) and cropped.dtype == torch.uint8
        assert torch.equal((image == torch.tensor(GREY)[:, None, None]).all(dim=0), cropped == 255)  # padding
        blurred = (F.max_pool2d(image[:1].float(), 3, 1, 1) + F.max_pool2d(-image[:1].float(), 3, 1, 1))[0] > 0
        assert ((image[0] > 127) == (cropped == 1))[~blurred & (cropped != 255)].all()
        values |= set(cropped.unique().tolist())
    assert values == {0, 1, 255}


def test_labels_are_not_shifted_when_they_are_resized():
    """A half plane, shrunk: the labels' border is where the image crosses its middle grey, to half a pixel."""
    for short in range(20, 90, 3):
        image, resized = augmentation(test_size=short).resize(*white_where(np.indices((90, 90))[1] >= 40))
        brightness = pixels(image)[0, 0].float().sum() / 255  # pixels right of the border
        assert abs(resized[0].sum() - brightness) <= 0.51


def test_sizes_are_uniform_strips_limited_and_half_of_the_images_mirrored():
    torch.manual_seed(0)
    right, resize = white_where(np.indices((32, 32))[1] > 9), augmentation(test_size=40, scale=(0.5, 2)).resize
    sides = [resize(*right)[0].height for _ in range(300)]
    assert min(sides) < 23 and max(sides) > 77 and np.mean(sides) == pytest.approx(50, abs=4)
    assert segment.scaled_size(10, 1000, 64) == (3, 256) and segment.scaled_size(100, 50, 64) == (128, 64)
    mirrored = sum(bool(augmentation()(*right)[1][0, 0]) for _ in range(60))
    assert 15 < mirrored < 45


def test_crops_have_no_more_of_one_class_than_allowed_and_padding_is_no_class(monkeypatch):
    labels, above = (np.indices((100, 100)) < 30).all(axis=0), {}
    for most in (1.0, 0.75):
        torch.manual_seed(0)
        fractions = [augmentation(most=most).crop(*white_where(labels))[1].float().mean() for _ in range(60)]
        above[most] = sum(max(fraction, 1 - fraction) > 0.75 for fraction in fractions)
    assert above[1.0] > 50 and above[0.75] < 40  # of ten crops, perhaps none fits
    padded = augmentation(60, most=0.75)
    call_at(monkeypatch, padded, "random_crop", 2)
    padded.crop(*white_where(np.indices((20, 20))[1] % 2))


# --- evaluation and prediction ----------------------------------------------------------------------------------------


@torch.no_grad()
def test_scores_are_those_of_a_plain_loop_and_of_the_networks_labels_upright(folder):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    for path in folder.glob("*/validation/*.png"):
        Image.open(path).crop((0, 0, 40, 48)).save(path, exif=exif)
    args, names = arguments(folder, test_size=40), [*NAMES, "nothing"]
    val, network = segment.load_images(args, "val"), randomised(UPerNet(small_encoder(stem_stride=2), len(names), 8, 8))
    segment.use_classes(val, maps.Classes(names, [], range(len(names))), least=1)
    network.classifier.bias.data[-1] -= 100
    chief, (scores, examples) = segment.evaluate(network.train(), val, args, CPU)
    assert network.training and scores["images"] == 3
    network.eval()
    for path, example in zip(val.items, examples, strict=True):
        image, truth = pixels(Path(path)), pixels(Path(path.replace("images", "annotations")))[0]
        prediction = network(((image / 255 - MEAN) / STD)[None]).argmax(dim=1)[0]
        assert all(torch.equal(one.long(), other.long()) for one, other in zip(example, (image, truth, prediction)))
    truth, prediction = (torch.stack(labels) for labels in [*zip(*examples)][1:])
    pairs = [(truth == k, prediction == k) for k in range(len(names))]
    iou = [(t & p).sum().item() / (t | p).sum().item() if (t | p).any() else None for t, p in pairs]
    accuracies = [p[t].double().mean().item() for t, p in pairs if t.any()]
    assert iou[-1] is None and scores == {"images": 3, "IoU_by_class": dict(zip(names, iou))} | chief
    means = [np.mean(iou[:-1]), (truth == prediction).double().mean().item(), np.mean(accuracies)]
    assert [chief[name] for name in ("mIoU", "accuracy", "mean_accuracy")] == pytest.approx(means, abs=1e-12)


def lookup(imgs: torch.Tensor) -> torch.Tensor:
    """Logits that are a fixed function of each pixel and of its window's mean."""
    mean = imgs.mean(dim=(1, 2, 3), keepdim=True)
    return torch.cat([imgs[:, :1] * 2, imgs[:, 1:2] - mean, (imgs * mean).sum(dim=1, keepdim=True)], dim=1)


lookup.encoder = small_encoder(stem_stride=1)


@pytest.mark.parametrize(("size", "window", "stride"), [((50, 70), 32, 20), ((20, 75), 32, 32), ((64, 64), 32, 7)])
def test_sliding_windows_are_a_plain_loop(size, window, stride):
    imgs = torch.randn(1, 3, *size)
    total, times = torch.zeros(1, 3, *size), torch.zeros(size)
    counts = [max(math.ceil((side - window) / stride), 0) + 1 for side in size]  # as OpenMMLab counts and places them
    for row, column in product(*map(range, counts)):
        bottom, right = min(row * stride + window, size[0]), min(column * stride + window, size[1])
        top, left = max(bottom - window, 0), max(right - window, 0)
        total[:, :, top:bottom, left:right] += lookup(imgs[:, :, top:bottom, left:right])
        times[top:bottom, left:right] += 1
    torch.testing.assert_close(segment.slide(lookup, imgs, window, stride), total / times)


def test_scales_and_mirroring_are_a_plain_loop_whatever_the_strips(monkeypatch):
    scales = 0.5, 1, 1.5
    args = arguments(None, test_size=40, test_scales=scales, flip=True, window=32, stride=16, stem_stride=1)
    image, total = torch.randint(256, (3, 50, 60), dtype=torch.uint8), torch.zeros(3, 50, 60)
    for scale, flipped in product(scales, ((), (3,))):  # dimensions
        size = [round(40 * scale), round(48 * scale)]
        view = F.interpolate(image[None].float(), size, mode="bilinear", antialias=True).round() / 127.5 * 2 - 2
        logits = segment.slide(lookup, view.flip(flipped), 32, 16).flip(flipped)
        total += F.interpolate(logits, (50, 60), mode="bilinear")[0].softmax(dim=0) / 6
    monkeypatch.setattr(segment, "STRIP", 7 * 60 * 3)  # seven rows
    strips = [*segment.probabilities(lookup, image, args)]
    assert [strip.shape[1] for strip in strips] == [*[7] * 7, 1]
    torch.testing.assert_close(torch.cat(strips, dim=1), total, atol=1e-2, rtol=0)  # resized bytes may round otherwise


def test_what_needs_more_memory_than_there_is_is_refused(folder, monkeypatch):
    net, imgs = torch.nn.Linear(1000, 500, device="meta"), torch.empty(64, 1000, device="meta", requires_grad=True)
    needed = 4 * (64 * 1000 + 64 * 500 + 500 * 1000) + 16 * 500 * 1001  # input, output and weights; with moments
    for size, fits in ((needed, True), (needed - 1, False)):
        monkeypatch.setattr(tasks.os, "sysconf", lambda name, size=size: size if name == "SC_PHYS_PAGES" else 1)
        with nullcontext() if fits else pytest.raises(UserError, match="training needs 0.0 GiB .*; lower it"):
            tasks.check_memory(net, lambda: net(imgs).relu(), None, CPU, "lower it")
    with pytest.raises(UserError, match="there are 0.0; lower --batch_size, --input_size or --channels"):
        segment.main(arguments(folder, input_size=256))


@pytest.fixture
def finished(folder, tmp_path) -> Path:
    """A run with --reduce_zero_label, whose average differs much from the weights."""
    helpers.write_maps(folder, "test", 3, seed=9)
    (folder / "classes.txt").write_text("\n".join(f"{name} {9 * k} {k} 250" for k, name in enumerate(SHAPES)))
    run(folder, tmp_path / "run", model_ema=True, lr=0.1, reduce_zero_label=True)
    return tmp_path / "run"


def use(finished, *more: str, **flags):
    return segment.get_args([*more, *words(**dict(resume=finished, device="cpu", num_workers=0) | flags)])


def test_evaluation_takes_what_it_needs_from_the_checkpoint_unless_flags_say_otherwise(folder, finished, tmp_path):
    args = use(finished, "--eval", output_dir=tmp_path)
    assert args.reduce_zero_label and args.data_path == str(folder) and args.test_size == 40
    segment.main(args)
    assert scores_in(tmp_path) == scores_in(finished)
    segment.main(use(finished, "--eval", output_dir=tmp_path, val_split="test"))
    assert scores_in(tmp_path) != scores_in(finished)
    args = use(finished, "--eval", data_set="embedded", window=24)  # normalised as the training's images were
    assert (args.statistics, args.data_path, args.stride, args.output_dir) == ("folder", None, 16, str(finished))


@torch.no_grad()
def test_prediction_writes_the_labels_of_the_average(finished, tmp_path, capsys):
    files = {"00000-a": tmp_path / "images/a.png", "00002-b": tmp_path / "images/sub/b.jpg"}
    for file, size in zip(files.values(), ((70, 50), (5, 170))):  # a patch is wider than the second
        save_noise(file, size)
    (tmp_path / "images/c.png").write_text("no image")
    newest, folder = find_checkpoints(finished)[-1], tmp_path / "predictions"
    args = use(newest, "--predict", str(tmp_path / "images"), output_dir=tmp_path)
    segment.main(args)
    assert {path.stem for path in folder.iterdir()} == {*files, *(f"{stem}-overlay" for stem in files)}
    nets, classes = segment.load_segmenters(args, CPU)
    assert classes.names == [*SHAPES] and classes.colours[1] == (9, 1, 250)
    for stem, file in files.items():
        strips = {key: [*segment.probabilities(net, pixels(file), args)] for key, net in nets.items()}
        labels = {key: torch.cat(value, dim=1).argmax(dim=0) for key, value in strips.items()}
        written = Image.open(folder / f"{stem}.png")
        assert (np.asarray(written) == labels["model_ema"].numpy() + 1).all()
        assert written.getpalette()[6:9] == [9, 1, 250] and not torch.equal(labels["model"], labels["model_ema"])
    counts = labels["model_ema"].flatten().bincount(minlength=10)
    assert f"sub/b.jpg: {SHAPES[counts.argmax()]} {counts.max() / counts.sum():.1%}" in capsys.readouterr().out


def test_an_evaluation_refuses_other_classes_than_those_trained_and_the_same_label_maps(folder, finished, tmp_path):
    (tmp_path / "reversed.txt").write_text("\n".join(reversed(SHAPES)))

    def refused(message: str, **flags) -> None:
        with pytest.raises(UserError, match=message):
            segment.main(use(finished, "--eval", **flags))

    refused("are disc, ring, .*, the validation data's cross, square", classes=tmp_path / "reversed.txt")
    refused("are disc, .*, the validation data's ground, disc", data_set="embedded")
    relabel(folder, lambda labels: np.full_like(labels, 255))
    refused("0 of 5 classes have .* of labels 255, where 255 and 0 do")
    Image.new("L", (48, 48)).save(folder / "annotations/validation/001.png", format="JPEG")
    refused("001.png is a JPEG file, whose compression changes numbers")


def test_the_drawn_images_are_those_of_detection_and_their_labels_the_shapes(tmp_path, drawn):
    run(None, tmp_path / "run", epochs=1, embedded_images=(7, 50))
    args = arguments(None, "--eval", resume=tmp_path / "run", embedded_images=(7, 50))
    images, (scenes, labels) = segment.load_images(args, "val"), helpers.write_maps(tmp_path, "val", 50, 1, 32)
    assert (images.items == scenes).all() and (images.labels == labels).all()
    assert segment.find_classes(args, images.pixels)[0] == NAMES
    assert sum(images.pixels.values()) == images.labels.size  # not those of the training images too
    assert (segment.load_images(args, "train").items == draw_scenes(50, 0, 32)[0][:7]).all()
    assert all(Image.open(tmp_path / f"run/{name}.png").width > 400 for name in ("segmentation", "scores"))


# --- training ---------------------------------------------------------------------------------------------------------


def test_training_is_a_plain_loop(folder, tmp_path):
    flags = dict(seed=5, epochs=1, lr=2e-3, warmup_updates=1, power=2.0, layer_decay=0.8, weight_decay=0.1, min_lr=1e-4)
    saved, log = run(folder, tmp_path, disable_eval=True, model_ema=True, **flags), read_log(tmp_path)

    args = arguments(folder, **flags)
    images = segment.load_images(args, "train")
    torch.manual_seed(5)
    net = segment.speed_up(segment.make_segmenter(args, len(NAMES))).train().to(memory_format=torch.channels_last)
    optimizer, average = torch.optim.AdamW(layer_groups(net, 0.8, 0.1), fused=True), {}
    order = torch.randperm(6, generator=torch.Generator().manual_seed(mix_seed("order", 5, 0))).tolist()
    for update, (row, lr) in enumerate(zip(log, (2e-3 / 2, 2e-3, 1e-4 + (2e-3 - 1e-4) / 4), strict=True)):
        samples = [images[0, index] for index in order[2 * update : 2 * update + 2]]
        imgs = torch.stack([(image / 255 - MEAN) / STD for image, _ in samples])
        labels = torch.stack([labels.long() for _, labels in samples])
        torch.manual_seed(mix_seed("step", 5, 0, update, 0))
        head, auxiliary = (F.cross_entropy(logits, labels, ignore_index=255) for logits in net(imgs))
        optimizer.zero_grad()
        (head + 0.4 * auxiliary).backward()
        for group in optimizer.param_groups:
            group["lr"] = lr * group["factor"]
        optimizer.step()
        expected = head.item(), 0.4 * auxiliary.item(), lr
        assert (row["loss_head"], row["loss_auxiliary"], row["lr"]) == pytest.approx(expected, abs=1e-5)
        keep = (1 + update) / (10 + update) if update else 0
        state = {name: value.clone() for name, value in net.state_dict().items() if value.is_floating_point()}
        average = {name: keep * average.get(name, 0) + (1 - keep) * state[name] for name in state}
    for name in state:
        torch.testing.assert_close(saved["model"][name], state[name], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(saved["model_ema"][name], average[name], rtol=1e-3, atol=1e-4)


def test_a_tenth_of_a_short_run_warms_up_and_1500_updates_of_a_long_one():
    for total, warmup in ((60, 6), (100_000, 1500)):
        args = SimpleNamespace(warmup_updates=None, min_lr=0.0, power=1.0)
        schedule = segment.make_schedule(SimpleNamespace(args=args, peak_lr=1.0, total=total))
        assert schedule(0) == 1 / (warmup + 1) and schedule(warmup - 1) == warmup / (warmup + 1)
        assert schedule(warmup) == 1 and schedule(total - 1) == pytest.approx(1 / (total - warmup))


def test_two_processes_train_and_evaluate_as_one_with_twice_the_batch(folder, tmp_path, monkeypatch):
    """All pixels count, since no crop is padded: of others, each process has its own number."""
    monkeypatch.setattr(segment, "UPerNet", partial(UPerNet, dropout=0.0))  # which each process draws for itself
    one, two = tmp_path / "one", tmp_path / "two"
    flags = dict(epochs=1, warmup_updates=0, opt="sgd", lr=1e-2, scale=(1, 2))
    expected = run(folder, one, batch_size=4, **flags)
    stress.wait(stress.fork(lambda: segment.main(arguments(folder, output_dir=two, **flags)), tmp_path, 2))
    assert_equal(load_file(find_checkpoints(two)[-1])["model"], expected["model"], rtol=2e-3, atol=2e-4)
    assert scores_in(one)["images"] == scores_in(two)["images"] == 3
    assert scores_in(one)["mIoU"] == pytest.approx(scores_in(two)["mIoU"], abs=0.02)


def test_the_best_weights_are_those_of_the_highest_miou(folder, tmp_path, monkeypatch):
    low, high = dict(mIoU=0.5, accuracy=0.9, mean_accuracy=0.9), dict(mIoU=0.6, accuracy=0.1, mean_accuracy=0.1)
    results, out = iter([(row, (row | {"images": 3}, [])) for row in 2 * (low, high, low)]), tmp_path / "run"
    monkeypatch.setattr(segment, "evaluate", lambda *_, **__: next(results))
    monkeypatch.setattr(maps, "draw_segmentation", lambda *_: None)
    run(folder, out, model_ema=True)
    best = load_file(out / "checkpoint-best.pth")
    assert best["epoch"] == 1 and best["mIoU"] == scores_in(out)["mIoU"] == log_of(out, "best_mIoU")[-1] == 0.6
    segment.main(arguments(None, "--eval", resume=out / "checkpoint-2.pth", output_dir=tmp_path))
    assert scores_in(tmp_path)["mIoU"] == 0.6


def test_the_recipe_is_the_published_one():
    args = segment.get_args(["--recipe", "ade20k", "--model", "convnextv2_base", "--data_path", "ade"])
    expected = dict(lr=None, blr=1.6e-3, iterations=160_000, warmup_updates=1500, power=1.0, layer_decay=0.9)
    expected |= dict(drop_path=0.3, input_size=512, weight_decay=0.05, channels=512, aux_channels=256, scale=(0.5, 2.0))
    expected |= dict(most=0.75, images_per_update=16, reduce_zero_label=True, photometric=True, batch_size=2)
    assert (expected | dict(layer_decay_type="group")).items() <= vars(args).items() and args.blr * 16 / 256 == 1e-4
