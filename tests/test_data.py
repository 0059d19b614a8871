"""Claims about data.py, plumbing/loading.py and plumbing/shapes.py: images, order, splits, labels and augmentation."""

import argparse
import os
import random
import re
import signal
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import CPU, run, save_noise, words
from PIL import Image, features
from timm.data import auto_augment
from torchvision.transforms import InterpolationMode

import data
import finetune
import pretrain
from data import Images, load_images, pretrain_transform
from model import MODELS
from plumbing import augmentation
from plumbing.files import UserError
from plumbing.loading import Samples, make_loader, mix_seed, progress
from plumbing.shapes import SHAPES, TEXTURES, draw_images, draw_scenes

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.fixture(autouse=True)
def nothing_said():
    """As in a process of its own, where no line has been printed yet."""
    data.say_once.cache_clear()


def folder(path: Path, transform=None, split: str = "train") -> Images:
    return load_images("folder", str(path), split, transform or data.center_transform(16))


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(256, size=shape, dtype=np.uint8)


def smooth(height: int, width: int) -> np.ndarray:
    """Pixels (H, W, 3) that no flip or turn leaves alone, and that JPEG hardly changes."""
    waves = np.sin(np.add.outer(np.linspace(0, 12, height), np.linspace(0, 8, width)))
    return (127 + 40 * np.stack([waves, waves[::-1], waves[:, ::-1] ** 2], axis=-1)).astype(np.uint8)


# --- drawn images -----------------------------------------------------------------------------------------------------


def test_drawn_images_are_balanced_independent_of_the_count_and_those_of_the_published_results():
    images, labels = draw_images(60, seed=0, size=32)
    assert images.shape == (60, 32, 32, 3) and images.dtype == np.uint8
    assert np.array_equal(images, draw_images(120, seed=0, size=32)[0][:60])
    assert np.bincount(labels[:50]).tolist() == [5] * len(TEXTURES)
    assert labels[:10].tolist() == [8, 5, 9, 9, 7, 0, 1, 4, 4, 1]
    expected = [[149, 231, 242], [204, 61, 185], [162, 128, 89]]
    assert np.abs(images[:3, 10, 20].astype(int) - expected).max() <= 1  # rounding differs among processors


def test_scenes_hold_three_shapes_each_whose_areas_are_those_of_their_kinds():
    images, kinds, masks = draw_scenes(200, seed=0, size=80)
    assert images.shape == (200, 80, 80, 3) and masks.shape == (200, 3, 80, 80) and masks.sum(axis=1).max() == 1
    assert images[~masks.any(axis=1)].mean() + 50 < min(images[masks[:, layer]].mean() for layer in range(3))
    front = masks[:, 2]  # which nothing covers
    whole = ~(front[:, [0, -1]].any(axis=(1, 2)) | front[:, :, [0, -1]].any(axis=(1, 2)))
    fractions = [m.sum() / np.prod(np.ptp(np.argwhere(m), axis=0) + 1) for m in front[whole]]  # of the bounding box
    by_kind = [np.array(fractions)[kinds[whole, 2] == SHAPES.index(name)] for name in SHAPES]
    turns = np.linspace(0, 0.5)  # radians; a square that is not turned stands on a corner
    square = 1 / (np.cos(turns - np.pi / 4) + np.abs(np.sin(turns - np.pi / 4))) ** 2
    cross = 0.51 / (np.cos(turns) + 0.3 * np.sin(turns)) ** 2
    expected = [np.pi / 4, np.pi / 4 * (1 - (0.49 / 0.95) ** 2), 0.5, square.mean(), cross.mean()]
    assert np.allclose([values.mean() for values in by_kind], expected, atol=0.03), by_kind


def test_as_many_embedded_images_are_drawn_as_are_asked_for(tmp_path, monkeypatch):
    argv = ["--embedded_images", "70", "55", "--output_dir", str(tmp_path)]
    train, val = finetune.load_labelled(finetune.get_args([*argv, "--scratch"]))
    assert (len(train), len(val)) == (70, 55) and train.classes == val.classes == TEXTURES
    assert len({image.tobytes() for images in (train, val) for image in images.items}) == 125  # the splits share none
    monkeypatch.setattr(pretrain, "Run", lambda args, images, *_: sys.exit(f"{len(images)} images"))
    with pytest.raises(SystemExit, match="70 images"):
        pretrain.main(pretrain.get_args(argv))


# --- files ------------------------------------------------------------------------------------------------------------

MODES = "jpg RGB,JPEG L,jpeg CMYK,png P,png RGBA,png LA,png 1,webp RGB,bmp RGB,tif L,gif P,avif L"
MODES = [(*pair.split(), {}) for pair in MODES.split(",")]
MODES += [("png", "P", {"transparency": b"\0" * 256}), ("png", "RGB", {"transparency": (0, 0, 0)})]


@pytest.mark.parametrize(("suffix", "mode", "options"), MODES)
def test_every_format_and_mode_becomes_rgb(tmp_path, suffix, mode, options):
    if suffix == "avif" and not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    save_noise(tmp_path / f"a.{suffix}", mode=mode, **options)
    images = folder(tmp_path)
    image, label = images[0, 0]
    assert image.shape == (3, 16, 16) and image.dtype == torch.uint8 and label == -1 and not images.unreadable.any()
    assert 40 < image.float().mean() < 215 and image.float().std() > 5


def test_a_moving_image_gives_its_first_frame_and_damaged_metadata_are_ignored(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert data.open_rgb(str(tmp_path / "moving.gif")).getpixel((0, 0)) == (255, 0, 0)
    save_noise(tmp_path / "a.jpg", exif=b"Exif\0\0no metadata at all")
    assert data.open_rgb(str(tmp_path / "a.jpg"), pretrain_transform(16).transforms[0]).size == (16, 16)


# How images of EXIF's orientations from 2 on are stored: what Pillow does to an upright one.
STORED = ["FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_90", "TRANSVERSE", "ROTATE_270"]


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize(("orientation", "turn"), [*enumerate(STORED, start=2)])
def test_images_and_their_crops_are_upright(tmp_path, orientation, turn, suffix):
    exif, path, pixels = Image.Exif(), str(tmp_path / f"photo.{suffix}"), smooth(256, 384)
    exif[0x0112] = orientation
    Image.fromarray(pixels).transpose(Image.Transpose[turn]).save(path, exif=exif, quality=95)
    assert np.abs(np.asarray(data.open_rgb(path)).astype(float) - pixels).mean() < 3
    for seed in range(3):
        crop = pretrain_transform(32).transforms[0]
        torch.manual_seed(seed)
        cropped = np.asarray(data.open_rgb(path, crop)).astype(float)
        torch.manual_seed(seed)
        assert np.abs(cropped - crop(Image.fromarray(pixels))).mean() < 4


@pytest.mark.parametrize(("name", "side"), [("a.jpg", 512), ("a.jpg", 16), ("a.png", 512), ("grey.jpg", 512)])
def test_a_crop_taken_while_decoding_is_the_crop_of_the_decoded_image(tmp_path, name, side, monkeypatch):
    image = Image.fromarray(smooth(side, side)).convert("L" if "grey" in name else "RGB")
    image.save(tmp_path / name, quality=95)
    images, widths, to_rgb = folder(tmp_path, pretrain_transform(32)), [], data.to_rgb
    monkeypatch.setattr(data, "to_rgb", lambda image, *more: widths.append(image.width) or to_rgb(image, *more))
    for epoch in range(20):
        crop = images[epoch, 0][0].float()
        torch.manual_seed(mix_seed("crop", 0, epoch, 0))
        expected = pretrain_transform(32)(Image.open(tmp_path / name).convert("RGB")).float()
        assert (crop - expected).abs().mean() < 4
        if "png" in name or side == 16:
            assert torch.equal(crop, expected)
    assert set(widths) == ({side} if "png" in name or side == 16 else {64, 128})


def test_a_crop_is_never_decoded_smaller_than_its_output(tmp_path, monkeypatch):
    Image.fromarray(noise(512, 512, 3)).save(tmp_path / "a.jpg")
    boxes, crop = [], data.v2.RandomResizedCrop(32)
    monkeypatch.setattr(crop, "make_params", lambda _: dict(top=0, left=0, height=130, width=500))
    monkeypatch.setattr(crop, "transform", lambda image, box: boxes.append(box))
    data.open_rgb(str(tmp_path / "a.jpg"), crop)
    assert boxes[0]["height"] == 32 and boxes[0]["width"] == 125


PROBLEMS = {
    "empty": (lambda path: path.write_bytes(b""), "cannot identify"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:700]), "(image file is truncated|broken data)"),
    "missing": (lambda path: path.unlink(), "no such file"),
    "bomb": (lambda path: save_noise(path, size=(60, 30)), ".*exceeds limit of 1600 pixels"),
}


@pytest.mark.parametrize("suffix", ["png", "jpg"])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_next_replaces_an_unreadable_image(tmp_path, capsys, monkeypatch, recwarn, problem, suffix):
    paths = [tmp_path / f"{k}.{suffix}" for k in range(3)]
    for path in paths:
        save_noise(path)
    damage, reason = PROBLEMS[problem]
    damage(paths[0])
    images = Images([*map(str, paths)], [0, 1, 2], list("abc"), pretrain_transform(16), IMAGENET, seed=5)
    state = torch.get_rng_state()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 800)  # of more Pillow warns, twice as many it refuses
    samples = [images[3, 0] for _ in range(2)]
    data.check_readable(images.items)  # one that can be read is enough
    assert torch.equal(torch.get_rng_state(), state) and not recwarn.list
    torch.manual_seed(mix_seed("crop", 5, 3, 0))  # the draws are those of seed, epoch and index, whatever is read
    expected = pretrain_transform(16)(Image.open(paths[1]).convert("RGB"))
    assert all(torch.equal(image, expected) and label == 1 for image, label in samples)
    assert images.unreadable.tolist() == [True, False, False]
    assert re.fullmatch(rf"warning: cannot read {paths[0]} \({reason}.*\)\n", capsys.readouterr().err)


# --- folders ----------------------------------------------------------------------------------------------------------


TAKEN = "ROOT/{} is used as ROOT/val, which does not exist"
LAYOUTS = {  # files -> split, classes of the images that are found by path (None without), and what is printed
    "b.jpg deep/er/a.png ünï'x'.jpg": ("train", {"b.jpg": None, "deep/er/a.png": None, "ünï'x'.jpg": None}, ""),
    "train/b/1.jpg train/_a/x/2.jpg val/b/3.jpg": ("train", {"train/_a/x/2.jpg": "_a", "train/b/1.jpg": "b"}, ""),
    "train/dog/x.jpg train/cat/y.jpg val/dog/z.jpg": ("val", {"val/dog/z.jpg": "dog"}, ""),
    "train/a/1.png validation/a/2.png": ("val", {"validation/a/2.png": "a"}, TAKEN.format("validation")),
    "train/a/1.png valid/a/2.png": ("val", {"valid/a/2.png": "a"}, TAKEN.format("valid")),
    "train/a/1.png valid/a/2.png val/a/3.png": ("val", {"val/a/3.png": "a"}, ""),
    "broken/1.png valid/2.png": ("val", {"broken/1.png": "broken", "valid/2.png": "valid"}, ""),
    "a/1.png b/2.png a/.3.png .tmp/4.png @eaDir/5.png a/@eaDir/6.png __MACOSX/7.png b/.git/8.png":
        ("train", {"a/1.png": "a", "b/2.png": "b"}, ""),
    "a.jpg b.PNG 1.heic 2.HEIC x/3.heic c.mov d.mov README .DS_Store .hidden.txt ._a.jpg Thumbs.db desktop.ini":
        ("train", {"a.jpg": None, "b.PNG": None}, "ROOT: 2 images; not read: 3 .heic, 2 .mov, 1 without a suffix"),
    "a/1.png runs/x/loss.png runs/x/predictions/9.png runs/x/log.jsonl out/predictions/0-overlay.png":
        ("train", {"a/1.png": "a"},
         "ROOT: 1 images; not read: the outputs in ROOT/out/predictions, the outputs in ROOT/runs/x"),
    "1.png predictions.csv progress.png predictions/0.png": ("train", {"1.png": None}, ""),
    "1.png progress.png": ("train", {"1.png": None, "progress.png": None}, ""),
}  # fmt: skip


@pytest.mark.parametrize("files", LAYOUTS)
def test_images_are_found_in_every_layout(tmp_path, capsys, files):
    for name in files.split():
        save_noise(tmp_path / name, format="PNG")  # whatever it is called
    split, expected, line = LAYOUTS[files]
    for _ in range(2):  # once to train with and once to draw, say
        images = folder(tmp_path, split=split)
    labels = [images.classes[label] for label in images.labels] if images.classes else [None] * len(images)
    assert dict(zip((os.path.relpath(path, tmp_path) for path in images.items), labels, strict=True)) == expected
    assert capsys.readouterr().out == line.replace("ROOT", str(tmp_path)) + "\n" * bool(line)
    assert images.items == sorted(images.items) and images.classes in (None, sorted({*labels}))


def test_links_are_followed_once_and_folders_that_cannot_be_read_are_named(tmp_path, monkeypatch, capsys):
    for name in ("real", "images", "images/closed"):
        save_noise(tmp_path / name / "a.png")
    (tmp_path / "images/link").symlink_to(tmp_path / "real")
    (tmp_path / "real/loop").symlink_to(tmp_path / "images")
    assert len(folder(tmp_path / "images")) == 3
    walk = data.os.scandir

    def refuse(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return walk(path)

    monkeypatch.setattr(data.os, "scandir", refuse)  # root may read everything
    assert [Path(path).parent.name for path in data.list_images(tmp_path / "images")] == ["images", "link"]
    error = f"warning: cannot read the folder {tmp_path / 'images/closed'} (Permission denied)\n"
    assert capsys.readouterr().err == error


@pytest.mark.parametrize(("script", "flags"), [(pretrain, {}), (finetune, dict(holdout=0.34))])
def test_a_run_in_the_folder_of_its_images_adds_none_to_them(tmp_path, monkeypatch, script, flags):
    for name in ("a/0.png", "a/1.png", "a/2.png", "b/0.png", "b/1.png", "b/2.png"):
        save_noise(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    run(script, ".", Path("."), epochs=1, **flags)
    assert {path.parent.name for path in map(Path, data.list_images("."))} == {"a", "b"}


def test_a_home_directory_is_expanded_in_every_path(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    args = pretrain.get_args(["--data_path=~/photos", "--output_dir", "~/runs", "--log_dir=logs"])
    assert (args.data_path, args.output_dir, args.log_dir) == (f"{tmp_path}/photos", f"{tmp_path}/runs", "logs")


DEEP = [  # type, values, --image_max, and the bytes that they become; None where they are refused
    (np.uint16, [250, 256, 32768], None, [0, 0, 127]),  # whatever the brightest pixel
    (np.uint16, [0, 2048, 4095], 4095, [0, 127, 255]),
    (np.int32, [-5, 1000, 70000], 2000, [0, 127, 255]),
    (np.float32, [0, 0.5, 1.01], None, [0, 127, 255]),
    (np.float32, [float("nan"), 1200, 4810], 4810, [0, 63, 255]),
    (np.float32, [0, 255], None, None),
    (np.float32, [0, np.nan], None, None),
]


@pytest.mark.parametrize(("kind", "values", "image_max", "expected"), DEEP)
def test_deep_images_are_scaled_by_one_number(tmp_path, capsys, kind, values, image_max, expected):
    white = image_max or (1 if kind == np.float32 else 65535)
    suffix = "png" if kind == np.uint16 else "tif"
    Image.fromarray(np.array([values] * 9, dtype=kind)).save(tmp_path / f"a.{suffix}")
    problem = pytest.raises(UserError, match="values from .* give all images' largest value as --image_max")
    with nullcontext() if expected else problem:
        images = load_images("folder", str(tmp_path), "train", data.center_transform(3), image_max=image_max)
        assert np.asarray(images.read(0))[0, :, 0].tolist() == expected
        assert f"{white} is white (--image_max)" in capsys.readouterr().out


CIFAR = {"cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))}
CIFAR["cifar100"] = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)


@pytest.mark.parametrize("name", CIFAR)
def test_cifar_comes_from_torchvision_with_its_own_statistics(name, monkeypatch):
    def fake(root, train, download):
        return argparse.Namespace(data=noise(5 + train, 32, 32, 3), targets=list(range(5 + train)), classes=["c"] * 7)

    monkeypatch.setattr(data.datasets, name.upper(), fake)
    train, val = finetune.load_labelled(finetune.get_args(["--scratch", "--data_set", name]))
    assert train.statistics == CIFAR[name] and len(train.classes) == 7 and (len(train), len(val)) == (6, 5)
    image, label = val[0, 4]
    assert label == 4 and np.array_equal(image.permute(1, 2, 0), noise(5, 32, 32, 3)[4])


# --- loaders ----------------------------------------------------------------------------------------------------------


def test_a_loading_process_that_ends_names_the_cure():
    class Ending(Samples):
        def __getitem__(self, position):
            os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does where shared memory is full

    with pytest.raises(UserError, match=r"--num_workers 0, or more shared memory: docker run --shm-size 2g"):
        list(make_loader(Ending([1, 2]), [[(0, 0)], [(0, 1)]], 1))


def test_a_long_evaluation_prints_lines_where_there_is_no_terminal(capsys):
    assert [*progress([1, 2, 3], every=0)] == [1, 2, 3] and [*progress([1])] == [1]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and "evaluated 2 of 3 batches, 00:00 left" in lines[1]


# --- labels -----------------------------------------------------------------------------------------------------------


def labelled(seed: int) -> Images:
    """Numbered images of three classes: the number's remainder."""
    items = np.arange(60, dtype=np.uint8).reshape(60, 1, 1, 1)
    return Images(items, [k % 3 for k in range(60)], ["a", "b", "c"], None, None, seed)


def numbers(images: Images) -> set[int]:
    values = images.items.flatten().tolist()
    assert [value % 3 for value in values] == images.labels and images.classes == ["a", "b", "c"]
    return set(values)


def test_few_labels_are_balanced_seeded_and_nested():
    def choose(count, seed):
        subset = data.few_labels(labelled(7), count, seed)
        assert subset.seed == 7 and [subset.labels.count(k) for k in range(3)] == [count] * 3
        return numbers(subset)

    assert choose(4, 0) == choose(4, 0) < choose(9, 0)
    assert choose(4, 1) != choose(4, 0)


def test_a_fraction_of_every_class_is_held_out_whatever_the_seed():
    train, held = data.split_holdout(labelled(7), 0.2)
    assert train.seed == held.seed == 7
    assert numbers(train) | numbers(held) == set(range(60)) and not numbers(train) & numbers(held)
    assert [held.labels.count(k) for k in range(3)] == [4] * 3
    assert numbers(data.split_holdout(labelled(1), 0.2)[1]) == numbers(held) != set(range(12))
    assert len(data.split_holdout(labelled(0), 0.02)[1]) == 2  # 2% of 20 images a class is none, of all 60 one or two


def test_folders_are_compared_by_name_with_the_networks_outputs(tmp_path, capsys, small_models):
    """A network that takes everything for a dog, the last of its four names, which win over those in its file."""
    names = ["ant", "bee", "cat", "dog"]
    for name in ("bee/0", "dog/0", "dog/1"):
        save_noise(tmp_path / f"val/{name}.png")
    net = MODELS["convnextv2_yocto"](num_classes=6, stem_stride=1)
    net.head.weight.data.zero_()
    net.head.bias.data[3] = 1
    torch.save({"model": net.state_dict(), "config": {"input_size": 16}, "classes": list("wxyz")}, tmp_path / "a.pth")
    (tmp_path / "names.txt").write_text("\ufeff# in order\n" + "\n".join(names))
    line = words(resume=tmp_path / "a.pth", data_path=tmp_path, output_dir=tmp_path / "out", device="cpu")
    line += words(num_workers=0, class_names=tmp_path / "names.txt")
    finetune.main(finetune.get_args(["--eval", *line]))
    output = capsys.readouterr().out
    assert "the images have 2 of the 4 classes" in output and "top-1 66.67%, balanced 50.00%" in output
    assert (tmp_path / "out/classes.csv").read_text().splitlines()[1:] == ["bee,1,0,0", "dog,2,2,100"]
    finetune.main(finetune.get_args(["--predict", str(tmp_path / "val"), *line]))
    assert re.search(",dog,.*class [45]", (tmp_path / "out/predictions.csv").read_text())


def test_a_balanced_loss_weights_the_images_of_each_class(tmp_path, monkeypatch):
    for name in ("dots/0", "dots/1", "dots/2", "dots/3", "rings/0"):  # weights 1 / .8 and 1 / .2, by 2 for a mean of 1
        save_noise(tmp_path / f"train/{name}.png", (32, 32))
    calls, cross_entropy = [], torch.nn.functional.cross_entropy
    monkeypatch.setattr(finetune.F, "cross_entropy", lambda *a, **k: calls.append(a) or cross_entropy(*a, **k))
    run(finetune, tmp_path, tmp_path / "run", class_balance=1.0, epochs=1, disable_eval=True)
    torch.testing.assert_close(calls[0][2], torch.tensor([0.625, 2.5]))


# --- transforms -------------------------------------------------------------------------------------------------------


def test_denormalise_is_the_inverse_of_normalise():
    pixels = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8)
    imgs = data.denormalise(data.normalise(pixels, IMAGENET, CPU), IMAGENET)
    torch.testing.assert_close(imgs, pixels / 255, rtol=0, atol=1e-6)
    assert data.denormalise(torch.full((1, 3, 1, 1), 99.0), IMAGENET).max() == 1


def test_random_crops_keep_the_papers_fraction_of_the_area():
    for flags, smallest in (({}, 0.08), (dict(min_crop=0.03), 0.03)):
        crop = augmentation.training_transform(224, IMAGENET, **flags).transforms[0]
        assert tuple(crop.scale) == (smallest, 1.0) and crop.interpolation == InterpolationMode.BICUBIC


@pytest.mark.parametrize("remode", ["pixel", "rand", "const"])
def test_erased_rectangles_hold_noise_one_colour_or_the_mean(remode):
    mean, std = ((0.5, 0.4, 0.3), (0.05, 0.05, 0.05)) if remode == "const" else ((0.5, 0.5, 0.5), (0.1, 0.1, 0.1))
    erase, values = augmentation.EraseBytes((mean, std), remode, 4), []
    assert erase.scale == pytest.approx((0.02 / 4, 1 / 12))
    for seed in range(150):
        torch.manual_seed(seed)
        image = erase(torch.zeros(3, 40, 40, dtype=torch.uint8))
        erased = image[:, image.sum(0) > 0].double() / 255  # (3, area)
        assert 0.004 < erased.shape[1] / 1600 < 0.1 and (remode == "pixel" or (erased == erased[:, :1]).all())
        values.append(erased if remode == "pixel" else erased[:, :1])
    values = torch.cat(values, dim=1)
    torch.testing.assert_close(values.mean(1), torch.tensor(mean).double(), rtol=0, atol=0.02)
    assert values.std(1).tolist() == pytest.approx([0 if remode == "const" else 0.1] * 3, abs=0.015)


def test_evaluation_crops_below_384_and_warps_from_there_on():
    pixels = np.zeros((256, 512, 3), dtype=np.uint8)
    pixels[:, :64] = 255  # visible only when the whole image is warped
    image = Image.fromarray(pixels)
    crop, warped = (data.evaluation_transform(size)(image) for size in (224, 384))
    assert crop.shape == (3, 224, 224) and not crop.any() and warped.shape == (3, 384, 384) and warped[:, :, :40].all()
    assert not data.evaluation_transform(224, crop_pct=1.0)(image).any()  # no wider than high, whatever the fraction
    assert data.evaluation_transform(32)(image)[:, :, :3].all()  # as training at that size
    assert data.describe_evaluation(384, 0.75, "x") == "at 384 px (the centre of a short side of 512), normalised as x"
    assert data.short_side(224, None) == 256


def test_a_strip_is_trimmed_and_its_centre_stays_what_it_was():
    assert data.trim(Image.new("RGB", (3, 5000))).size == (3, 48)  # a whole line, scaled up, would fill the memory
    strip = Image.fromarray(noise(4, 600, 3))
    scaled = strip.resize((2400, 16), Image.Resampling.BICUBIC).crop((1192, 0, 1208, 16))
    assert np.array_equal(data.center_transform(16)(strip).permute(1, 2, 0), np.asarray(scaled))


@pytest.mark.parametrize("name", ["rand-m9-mstd0.5-inc1", "original", "trivial"])
def test_automatic_augmentation_fills_with_the_mean_colour_and_resamples_as_crops_are(name):
    flat = Image.new("RGB", (24, 24), data.GREY)
    stripes = Image.fromarray(np.repeat((np.arange(24) % 2 * 255).astype(np.uint8)[None, :, None], 24, 0).repeat(3, 2))
    differences = 0
    for seed in range(60):
        arrays = []
        for mode, image in (("bicubic", flat), ("bicubic", stripes), ("nearest", stripes)):
            torch.manual_seed(seed)
            transform = augmentation.automatic_augmentation(name, IMAGENET[0], InterpolationMode(mode))
            arrays.append(np.asarray(transform(image)).reshape(-1, 3))
        assert len(np.unique(arrays[0], axis=0)) == 1  # whatever moves
        differences += not np.array_equal(arrays[1], arrays[2])
    assert differences > 5


def test_randaugment_is_timms():
    image = Image.fromarray(np.random.default_rng(0).integers(60, 200, size=(24, 24, 3), dtype=np.uint8))
    augment = partial(augmentation.automatic_augmentation, mean=IMAGENET[0], interpolation=InterpolationMode.BICUBIC)
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    name = "rand-m9-n2-mstd0-inc1"  # timm fails where its std leads to posterising to no bits at all
    theirs = auto_augment.rand_augment_transform(name, dict(translate_const=10, img_mean=data.GREY))
    alone = [sum(transform(image) == image for _ in range(400)) / 400 for transform in (theirs, augment(name))]
    assert alone[0] == pytest.approx(0.25, abs=0.06) and alone[1] == pytest.approx(alone[0], abs=0.1)
    (operation,) = augment("rand-m7-n1").transforms[0].transforms
    assert (operation.magnitude, operation.num_magnitude_bins, operation.num_ops) == (21, 31, 1)
    assert len(augment("rand-m9-n3").transforms) == 3
