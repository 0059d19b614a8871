"""Claims about edges that must simply work: odd names, odd pictures, little data, poor surroundings."""

import csv
import io
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import save_noise, small
from PIL import Image
from test_bad_input import bomb
from test_data import folder
from torchvision.transforms import v2

import analyze
import data
import finetune
import pretrain
from plumbing.files import load_file
from plumbing.log import read_log
from plumbing.script import run_script

UNDECODABLE = os.fsdecode(b"\xff\xfe")  # what Python makes of a name that is not UTF-8
NAMES = ("with  spaces", "quote's\"", "new\nline", "ünï日本", UNDECODABLE, "..data", "$^{$", "-n", "%d{}")


def flags(script, images, output_dir, **more) -> list[str]:
    return small(script, images, output_dir, **dict(input_size=16, epochs=1, warmup_epochs=None) | more)


def run(script, argv: list[str], output_dir=None) -> dict | None:
    """Run a script's main in this process; the last record of its log."""
    run_script(script.main, lambda: script.get_args([str(word) for word in argv]))
    return read_log(output_dir)[-1] if output_dir else None


@pytest.fixture(scope="module")
def named(tmp_path_factory) -> Path:
    """A picture named like each of `NAMES` in a class folder of that name, in train and in val."""
    root = tmp_path_factory.mktemp("named")
    for split in ("train", "val"):
        for name in NAMES:
            save_noise(root / split / name / f"{name}.png", size=(16, 16))
    return root


@pytest.fixture(scope="module")
def classifier(named, tmp_path_factory) -> Path:
    """A run directory of a classifier of the classes `NAMES`."""
    output_dir = tmp_path_factory.mktemp("classifier")
    run(finetune, flags(finetune, named, output_dir))
    return output_dir


# --- names


def test_classes_of_any_name_are_trained_saved_and_evaluated(named, classifier, capsys):
    assert load_file(classifier / "checkpoint-1.pth")["classes"] == sorted(NAMES)
    run(finetune, ["--eval", "--resume", classifier / "checkpoint-1.pth", "--data_path", named, "--device", "cpu"])
    assert f"on {len(NAMES)} images" in capsys.readouterr().out


def test_predictions_for_any_name_take_one_line_each_and_any_encoding(named, classifier, monkeypatch):
    (named / "bad").mkdir()
    (named / "bad" / f"{UNDECODABLE}.png").write_text("not an image")
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="backslashreplace"))
    run(finetune, ["--predict", named / "val", named / "bad", "--resume", classifier / "checkpoint-best.pth", "--device", "cpu"])
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    preparation, *lines, wrote = sys.stdout.buffer.getvalue().decode().splitlines()
    assert "10 images at 16 px (whole, warped to the square), normalised as folder" in preparation
    assert len(lines) == len(NAMES) and all(line.startswith(str(named)) and line.count("%") >= 5 for line in lines)
    assert any("with  spaces" in line for line in lines) and any("\\udcff" in line for line in lines)
    assert sys.stderr.buffer.getvalue().decode().count("cannot read") == 1
    assert wrote == f"wrote predictions.csv of {len(NAMES)} images (1 could not be read) to {classifier}"


def test_figures_and_tables_take_any_name(named, classifier, tmp_path):
    words = ["--checkpoint", classifier, "--label", "$\\frac$", "--data_path", named, "--neighbours", 1, "--device", "cpu"]
    run(analyze, ["embed", *words, "--output_dir", tmp_path])
    with open(tmp_path / "embed.csv", newline="", encoding="utf-8", errors="surrogateescape") as file:
        assert {row["class"] for row in csv.DictReader(file)} == set(NAMES)
    assert min(Image.open(tmp_path / "embed.png").size) > 250


def test_a_run_in_poor_surroundings_draws_its_pictures(named, tmp_path):
    """No display, a backend that does not exist, no encoding but ASCII, and odd names for everything."""
    environment = {name: value for name, value in os.environ.items() if name != "DISPLAY"}
    environment |= {
        "MPLBACKEND": "nonsense",
        "LC_ALL": "C",
        "PYTHONIOENCODING": "ascii",
        "PYTHONCOERCECLOCALE": "0",
        "PYTHONUTF8": "0",
    }
    output_dir = tmp_path / UNDECODABLE / "new\nline $^{$"
    argv = [sys.executable, Path(pretrain.__file__), *flags(pretrain, named, output_dir)]
    result = subprocess.run(argv, capture_output=True, env=environment)
    assert result.returncode == 0 and result.stderr == b"", result.stderr
    assert {"loss.png", "reconstructions.png", "encoder.pth"} < {path.name for path in output_dir.iterdir()}


def test_output_that_nobody_reads_on_ends_a_script_without_a_word(named, classifier):
    script = Path(finetune.__file__)
    command = (
        f"{sys.executable} -u {script} --predict {named}/val --resume {classifier}/checkpoint-best.pth --device cpu | head -n 1"
    )
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert result.stdout.count("\n") == 1 and "Traceback" not in result.stderr


# --- pictures


def test_pictures_of_every_size_and_kind_train_together(tmp_path):
    images = tmp_path / "images"
    for i, (size, mode) in enumerate(
        [((1, 1), "RGB"), ((30000, 1), "RGB"), ((1, 30000), "L"), ((40, 30), "CMYK"), ((20, 20), "1")]
    ):
        save_noise(images / f"{i}.{'jpg' if mode == 'CMYK' else 'png'}", size=size, mode=mode)
    Image.fromarray(np.arange(400, dtype=np.uint16).reshape(20, 20) * 100).save(images / "deep.png")
    frames = [Image.new("P", (20, 20), k) for k in range(3)]
    frames[0].save(images / "moving.gif", save_all=True, append_images=frames[1:])
    record = run(pretrain, flags(pretrain, images, tmp_path / "out", batch_size=7), tmp_path / "out")
    assert record["loss"] == pytest.approx(1, abs=0.2) and record["unreadable_images"] == 0


def test_a_strip_is_trimmed_and_its_centre_stays_what_it_was(tmp_path):
    save_noise(tmp_path / "strip.png", size=(400, 10))
    image = Image.open(tmp_path / "strip.png")
    plain = v2.Compose([v2.Resize(20, interpolation=v2.InterpolationMode.BICUBIC), v2.CenterCrop(20), v2.PILToTensor()])
    assert torch.equal(data.center_transform(20)(image), plain(image))
    for line in (Image.new("RGB", (30000, 1)), Image.new("RGB", (1, 30000))):  # 224 wide in full, 4.5 GB
        assert max(data.trim(line).size) == 16
        assert data.evaluation_transform(224)(line).shape == data.center_transform(224)(line).shape == (3, 224, 224)


def test_pictures_are_read_as_stored_whatever_their_orientation_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    save_noise(tmp_path / "turned.jpg", size=(40, 30), exif=exif)
    assert data.open_rgb(tmp_path / "turned.jpg").size == (40, 30)


def test_only_the_first_frame_of_a_moving_picture_is_read(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert data.open_rgb(tmp_path / "moving.gif").getpixel((0, 0)) == (255, 0, 0)


def test_large_pictures_are_read_without_remarks_and_bombs_are_unreadable_at_once(tmp_path, monkeypatch, recwarn):
    for i in range(120):
        save_noise(tmp_path / f"images/{i:03}.png", size=(16, 16))
    bomb(tmp_path / "images/bomb.png")
    start = time.perf_counter()
    record = run(pretrain, flags(pretrain, tmp_path / "images", tmp_path / "out", batch_size=121), tmp_path / "out")
    assert record["unreadable_images"] == 1 and time.perf_counter() - start < 30
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    save_noise(tmp_path / "large.png", size=(40, 30))
    assert data.open_rgb(tmp_path / "large.png").size == (40, 30)
    assert not [warning for warning in recwarn if "bomb" in str(warning.message)]
    save_noise(tmp_path / "larger.png", size=(80, 30))
    with pytest.raises(Image.DecompressionBombError):
        data.open_rgb(tmp_path / "larger.png")


def test_the_picture_that_stands_in_for_an_unreadable_one_brings_its_own_class(tmp_path):
    for i in range(3):
        save_noise(tmp_path / f"b/{i}.png")
    (tmp_path / "a").mkdir()
    (tmp_path / "a/text.png").write_text("not an image")
    images = folder(tmp_path)
    assert images.classes == ["a", "b"] and images[0, 0][1:] == (1, 0) and images[0, 1][1:] == (1, -1)


def test_a_hundred_unreadable_neighbours_become_a_black_picture_soon(tmp_path):
    for i in range(150):
        (tmp_path / f"{i:03}.png").write_text("not an image")
    save_noise(tmp_path / "zzz.png")
    (tmp_path / "010.png").write_bytes((tmp_path / "zzz.png").read_bytes())  # among those that are tried at the start
    save_noise(tmp_path / "000.png")
    images = folder(tmp_path)
    picture, _, failed = images[0, 20]
    assert failed == 20 and not picture.any() and images[0, 60][0].any()


def test_folders_that_cannot_be_read_are_named_and_the_others_used(tmp_path, monkeypatch, capsys):
    save_noise(tmp_path / "open/a.png")
    save_noise(tmp_path / "lost\nfound/b.png")
    scandir = os.scandir

    def guarded(path):
        if "lost" in os.fspath(path):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    assert len(folder(tmp_path)) == 1
    error = capsys.readouterr().err
    assert "lost found (Permission denied)" in error and error.count("\n") == 1


# --- little data


@pytest.mark.parametrize(
    ("more", "updates"),
    [
        (dict(batch_size=100), 1),
        (dict(batch_size=1), 9),
        (dict(batch_size=4, update_freq=100), 1),
        (dict(num_workers=1), 2),
        (dict(batch_size=1, mixup=0.8, cutmix=1), 9),
    ],
)
def test_batches_larger_smaller_and_not_dividing_the_data_train(named, tmp_path, more, updates):
    last = run(finetune, flags(finetune, named, tmp_path, **more), tmp_path)
    assert last["update"] == updates and last["val_loss"] == pytest.approx(math.log(9), rel=0.3)  # near its start, a guess among 9


def test_one_image_of_one_class_is_enough(tmp_path, capsys):
    for split in ("train", "val"):
        save_noise(tmp_path / "data" / split / "only/a.png", size=(16, 16))
    argv = flags(finetune, tmp_path / "data", tmp_path / "out", mixup=0.5, smoothing=0.1)
    assert run(finetune, argv, tmp_path / "out")["val_top1"] == 100
    capsys.readouterr()
    run(finetune, argv)  # again, with its epochs done
    assert "already finished" in capsys.readouterr().out
    run(finetune, ["--predict", tmp_path / "data/val", "--resume", tmp_path / "out/checkpoint-1.pth", "--device", "cpu"])
    assert "only 100.0%" in capsys.readouterr().out


def test_validation_data_alone_are_enough_to_evaluate(named, classifier, tmp_path, capsys):
    (tmp_path / "val").symlink_to(named / "val")
    run(finetune, ["--eval", "--resume", classifier / "checkpoint-1.pth", "--data_path", tmp_path, "--device", "cpu"])
    assert f"on {len(NAMES)} images" in capsys.readouterr().out


def test_unreadable_validation_images_are_named_and_left_out(named, classifier, tmp_path, capsys):
    for name in NAMES:
        (tmp_path / name).symlink_to(named / "val" / name)
    (tmp_path / "more").mkdir()
    (tmp_path / "more/text.png").write_text("not an image")
    (tmp_path / "more").rename(tmp_path / "rest")
    (tmp_path / "..data").unlink()
    (tmp_path / "rest").rename(tmp_path / "..data")
    flags = ["--eval", "--resume", classifier / "checkpoint-1.pth", "--eval_data_path", tmp_path, "--device", "cpu"]
    run(finetune, flags)
    output = capsys.readouterr()
    assert f"on {len(NAMES) - 1} images" in output.out and output.err.count("cannot read") == 1


def test_the_learning_rate_follows_the_images_that_an_update_has(named, tmp_path):
    for name, freq in (("a", 2), ("b", 50)):  # 9 images of 4 and 4: one update per epoch
        argv = flags(pretrain, named, tmp_path / name, update_freq=freq, epochs=2, warmup_epochs=0, lr=None, blr=1e-2)
        last = run(pretrain, argv, tmp_path / name)
        assert last["update"] == 2 and last["lr"] == pytest.approx(1e-2 * 8 / 256 / 2)  # half way down the cosine
