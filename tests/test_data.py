"""Claims about data.py."""

import argparse
import sys

import numpy as np
import pytest
import torch
from helpers import ALONE, save_noise
from PIL import Image

import data
import detect
import finetune
import pretrain
import segment
from data import STATISTICS, TEXTURES, Images, center_transform, draw_images, load_images, pretrain_transform, training_transform
from plumbing.loading import EpochSampler, Unreadable, make_loader
from plumbing.script import UserError
from plumbing.seeds import mix_seed


def folder(path, transform=None, split="train"):
    return load_images("folder", str(path), split, transform or center_transform(16))


# --- the embedded data


def test_embedded_pictures_are_deterministic_balanced_and_independent_of_the_count():
    images, labels = draw_images(60, seed=3, size=32)
    again, _ = draw_images(120, seed=3, size=32)
    assert images.shape == (60, 32, 32, 3) and images.dtype == np.uint8
    assert np.array_equal(images, again[:60])
    assert np.bincount(labels[:50]).tolist() == [5] * len(TEXTURES)
    assert not np.array_equal(images, draw_images(60, seed=4, size=32)[0])


def test_embedded_splits_share_no_picture():
    train, val = (load_images("embedded", None, split, center_transform(64)) for split in ("train", "val"))
    assert (len(train), len(val)) == (4000, 1000) and train.classes == TEXTURES
    seen = {image.tobytes() for image in train.items}
    assert len(seen) == 4000 and not any(image.tobytes() in seen for image in val.items)


def test_as_many_embedded_images_are_drawn_as_are_asked_for(tmp_path, monkeypatch):
    asked = ["--embedded_images", "70", "55", "--output_dir", str(tmp_path)]
    assert [len(images) for images in finetune.load_labelled(finetune.get_args([*asked, "--scratch"]))] == [70, 55]
    for load, args in ((detect.load_scenes, detect.get_args(asked)), (segment.load_maps, segment.get_args(asked))):
        found = [load(args, split, None) if load == segment.load_maps else load(args, split)[0] for split in data.SPLITS]
        assert [len(images) for images in found] == [70, 55]
    counts = []
    monkeypatch.setattr(pretrain, "Run", lambda args, images, *more: counts.append(len(images)) or sys.exit())
    with pytest.raises(SystemExit):
        pretrain.main(pretrain.get_args(asked))
    assert counts == [70]


def test_a_shape_is_larger_than_its_clutter_and_differs_from_its_ground(monkeypatch):
    """Of three shapes in a picture the first two are clutter. The same pictures are drawn with some of them left out."""
    distance = data._distance

    def draw(*shapes):
        asked = iter(range(3 * len(data.SHAPES)))  # once for every kind of shape, three times over
        monkeypatch.setattr(
            data, "_distance", lambda *args: distance(*args) if next(asked) // 10 in shapes else np.ones_like(args[1])
        )
        return draw_images(50, seed=0)[0].astype(int)

    ground = draw()
    seen = [
        abs(draw(shape) - ground).max(axis=3) for shape in range(3)
    ]  # (n, H, W): how far a shape's pixels are from the ground's
    small, other, main = ((difference > 8).mean(axis=(1, 2)) for difference in seen)  # (n,): the share of the picture
    assert main.min() > 0.05 and main.max() < 0.3 and max(small.max(), other.max()) < 0.04 and min(small.min(), other.min()) > 0.005
    assert (main > 2 * np.maximum(small, other)).all()
    assert all(difference[difference > 8].mean() > 60 for difference in seen[2])  # of 255 levels


# --- folders


@pytest.mark.parametrize(
    ("name", "mode", "options"),
    [
        ("a.jpg", "RGB", {}),
        ("a.JPEG", "L", {}),
        ("a.jpeg", "CMYK", {}),
        ("a.png", "P", {}),
        ("a.png", "P", {"transparency": b"\0" * 256}),
        ("a.png", "RGB", {"transparency": (0, 0, 0)}),
        ("a.png", "RGBA", {}),
        ("a.png", "LA", {}),
        ("a.png", "1", {}),
        ("a.png", "I;16", {}),
        ("a.webp", "RGB", {}),
        ("a.bmp", "RGB", {}),
        ("a.tif", "RGB", {}),
        ("a.tiff", "F", {}),
        ("a.gif", "P", {}),
    ],
)
def test_every_format_and_mode_becomes_rgb(tmp_path, name, mode, options):
    if mode == "I;16":
        Image.fromarray(np.linspace(0, 65535, 1200).reshape(30, 40).astype(np.uint16)).save(tmp_path / name)
    else:
        save_noise(tmp_path / name, mode=mode, **options)
    image, label, failed = folder(tmp_path)[0, 0]
    assert image.shape == (3, 16, 16) and image.dtype == torch.uint8 and (label, failed) == (-1, -1)
    assert 40 < image.float().mean() < 215 and image.float().std() > 5


def test_sixteen_bit_images_keep_their_gradation(tmp_path):
    Image.fromarray(np.linspace(0, 65535, 256).reshape(16, 16).astype(np.uint16)).save(tmp_path / "a.png")
    image, _, _ = folder(tmp_path)[0, 0]
    assert torch.equal(image[0].flatten(), torch.arange(256, dtype=torch.uint8))


def test_nested_flat_and_class_folders(tmp_path):
    for name in ("b.jpg", "deep/er/a.png", "ünï cödé\n'x'.jpg", "note.txt"):
        save_noise(tmp_path / "flat" / name) if not name.endswith("txt") else (tmp_path / "flat" / name).write_text("")
    flat = folder(tmp_path / "flat")
    assert len(flat) == 3 and flat.labels is None
    for name in ("train/dog/x.jpg", "train/cat/deep/y.jpg", "train/..data/z.jpg", "val/cat/w.jpg"):
        save_noise(tmp_path / "classes" / name)
    train, val = folder(tmp_path / "classes"), folder(tmp_path / "classes", split="val")
    assert train.classes == ["..data", "cat", "dog"] and train.labels == [0, 1, 2] and len(val) == 1
    assert [train[0, i][1] for i in range(3)] == [0, 1, 2]


def test_links_are_followed_but_never_in_circles(tmp_path):
    save_noise(tmp_path / "real/a.jpg")
    (tmp_path / "images").mkdir()
    (tmp_path / "images/link").symlink_to(tmp_path / "real")
    (tmp_path / "real/loop").symlink_to(tmp_path / "images")
    assert len(folder(tmp_path / "images")) == 1


@pytest.mark.parametrize(("name", "side"), [("a.jpg", 512), ("a.jpg", 16), ("a.png", 512), ("grey.jpg", 512)])
def test_a_crop_taken_while_decoding_is_the_crop_of_the_decoded_image(tmp_path, name, side, monkeypatch):
    ramp = np.linspace(0, 255, side)
    waves = 40 * np.sin(np.arange(side) / side * 10)
    pixels = np.stack([np.add.outer(ramp, waves), np.add.outer(waves, ramp), np.add.outer(-ramp + 255, waves)], axis=-1)
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert("L" if "grey" in name else "RGB")
    image.save(tmp_path / name, quality=95)
    images, decoded = folder(tmp_path, transform=pretrain_transform(32)), []
    original = data.to_rgb
    monkeypatch.setattr(data, "to_rgb", lambda image: decoded.append(image.width) or original(image))
    for epoch in range(20):
        found = images[epoch, 0][0].float()
        torch.manual_seed(mix_seed("crop", 0, epoch, 0))
        wanted = pretrain_transform(32)(Image.open(tmp_path / name).convert("RGB")).float()
        assert (found - wanted).abs().mean() < 4
        if "png" in name or side == 16:
            assert torch.equal(found, wanted)
    assert set(decoded) == ({side} if "png" in name or side == 16 else {64, 128})  # never less than 32 pixels of crop


def test_an_unreadable_image_is_replaced_named_and_counted(tmp_path, capsys):
    for i in range(200):
        save_noise(tmp_path / f"{i:03}.jpg")
    (tmp_path / "007.jpg").write_bytes((tmp_path / "007.jpg").read_bytes()[:300])
    images = folder(tmp_path)
    assert images[0, 7][2] == 7 and torch.equal(images[0, 7][0], images[0, 8][0]) and images[0, 8][2] == -1
    unreadable = Unreadable(images)
    for _ in range(2):
        unreadable.note(torch.tensor([-1, 7]))
    assert capsys.readouterr().err.count("007.jpg") == 1
    unreadable.check(ALONE)
    unreadable.note(torch.arange(20, 29))
    unreadable.check(ALONE)  # ten may be a small folder's share of bad luck
    unreadable.note(torch.tensor([3]))
    with pytest.raises(UserError, match=r"11 of 200 images cannot be read, more than ten and 1%"):
        unreadable.check(ALONE)


# --- held on the device


@pytest.mark.parametrize("size", [24, 32, 48])
@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_held_images_are_the_loaders_to_rounding(stage, size):
    transform = pretrain_transform(size) if stage == "pretrain" else training_transform(size, STATISTICS["embedded"])
    images = load_images("embedded", None, "val", transform, seed=5)
    held = data.HeldImages(images, torch.device("cpu"))
    places = [(3, index) for index in range(0, 1000, 10)]
    loaded, rendered = (
        torch.cat([source.render(batch) for batch, _, _ in make_loader(source, [places[:50], places[50:]], workers, False)]).float()
        for source, workers in ((images, 0), (held, 1))
    )
    assert rendered.shape == loaded.shape and [held[place][1:] for place in places] == [images[place][1:] for place in places]
    difference = (rendered - loaded).abs()
    assert difference.mean() < 0.3 and (difference <= 1).float().mean() > 0.99  # Pillow rounds twice, and clips between
    mirrored = rendered.flip(3)
    assert (mirrored - loaded).abs().mean() > 10


def test_only_what_is_cropped_and_flipped_in_memory_is_held(tmp_path):
    save_noise(tmp_path / "a.png")
    device = torch.device("cpu")
    statistics = STATISTICS["embedded"]
    assert not data.HeldImages.fit(folder(tmp_path, pretrain_transform(16)))
    images = load_images("embedded", None, "val", None)
    for fit, transform in (
        (True, training_transform(16, statistics)),
        (False, training_transform(16, statistics, aa="rand-m9-mstd0.5-inc1")),
        (False, training_transform(48, statistics, color_jitter=0.4)),
        (False, training_transform(48, statistics, reprob=0.25)),
        (False, training_transform(48, statistics, interpolation="bilinear")),
        (False, center_transform(16)),
        (False, None),
    ):
        images.transform = transform
        assert data.HeldImages.fit(images) == fit
        assert (
            data.hold_on_device(images, argparse.Namespace(hold_data=None), device) is images
        )  # CPUs keep the loader unless told otherwise
        if fit:
            assert isinstance(data.hold_on_device(images, argparse.Namespace(hold_data=True), device), data.HeldImages)
        else:
            with pytest.raises(UserError, match="hold_data"):
                data.hold_on_device(images, argparse.Namespace(hold_data=True), device)


# --- CIFAR


@pytest.mark.parametrize(("name", "classes"), [("cifar10", 10), ("cifar100", 100)])
def test_cifar_comes_from_torchvision_with_its_own_statistics(name, classes, monkeypatch):
    class Fake:
        def __init__(self, root, train, download):
            self.data = np.zeros((5, 32, 32, 3), dtype=np.uint8)
            self.targets, self.classes = [0, 1, 2, 3, 4], [str(k) for k in range(classes)]

    monkeypatch.setattr(data.datasets, "CIFAR10", Fake)
    monkeypatch.setattr(data.datasets, "CIFAR100", Fake)
    images = load_images(name, None, "train", center_transform(32))
    assert images.statistics == data.STATISTICS[name] and len(images.classes) == classes
    assert images[0, 4][1] == 4


def test_cifar_that_cannot_be_had_is_one_line(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise RuntimeError("no network")

    monkeypatch.setattr(data.datasets, "CIFAR10", refuse)
    with pytest.raises(UserError, match="cifar10 is not in .*no network"):
        load_images("cifar10", str(tmp_path), "train", None)


# --- randomness and loaders


@pytest.mark.parametrize("transform", [pretrain_transform(16), training_transform(16, ()), training_transform(40, ())])
def test_half_of_the_crops_are_mirrored(transform):
    ramp = np.arange(48, dtype=np.uint8)[None, None, :, None].repeat(48, axis=1).repeat(3, axis=3)  # brighter to the right
    images = Images(ramp, None, None, transform, None)
    mirrored = sum(crop[..., :8].sum() > crop[..., -8:].sum() for crop, _, _ in (images[epoch, 0] for epoch in range(400)))
    assert 150 < mirrored < 250  # 200 and five standard deviations of 10


def test_a_crop_depends_on_seed_epoch_and_index_alone():
    images = load_images("embedded", None, "val", pretrain_transform(32), seed=5)
    first = images[2, 11][0]
    torch.manual_seed(123)
    state = torch.get_rng_state()
    assert torch.equal(images[2, 11][0], first)
    assert torch.equal(torch.get_rng_state(), state)  # and leaves the global generator alone
    assert not torch.equal(images[3, 11][0], first)
    images.seed = 6
    assert not torch.equal(images[2, 11][0], first)


def test_any_number_of_workers_gives_the_same_batches(tmp_path):
    for i in range(12):
        save_noise(tmp_path / f"{i}.jpg")
    images = folder(tmp_path, pretrain_transform(16))
    runs = []
    for workers in (0, 2):
        sampler = EpochSampler(len(images), 4, 0, 1, seed=1)
        loader = make_loader(images, sampler, workers, False)
        epochs = []
        for sampler.epoch in range(2):
            epochs.append(torch.stack([batch[0] for batch in loader]))
        runs.append(torch.stack(epochs))
    assert torch.equal(*runs) and not torch.equal(runs[0][0], runs[0][1])


def test_the_order_is_the_same_however_it_is_divided():
    def order(batch_size, world_size, length=26, first=0):
        samplers = [EpochSampler(length, batch_size, rank, world_size, seed=1) for rank in range(world_size)]
        for sampler in samplers:
            sampler.epoch, sampler.first_batch = 3, first
        return [index for batches in zip(*samplers) for batch in batches for _, index in batch]

    whole = order(8, 1)
    assert len(whole) == len(set(whole)) == 24
    assert order(4, 2) == order(2, 4) == order(2, 1)[:24] == whole
    assert order(4, 2, first=1) == whole[8:]  # continued after one batch of each
    assert order(8, 1, length=25) != whole


def test_normalise_and_denormalise_are_inverse():
    pixels = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8)
    x = data.normalise(pixels, data.STATISTICS["folder"], torch.device("cpu"))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in data.STATISTICS["folder"])
    torch.testing.assert_close(x, (pixels / 255 - mean) / std)
    torch.testing.assert_close(data.denormalise(x, data.STATISTICS["folder"]), pixels / 255, rtol=0, atol=1e-6)
