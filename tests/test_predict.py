"""Claims about finetune.py --predict, and that --eval, --predict and the lines of docs/weights.md see an image alike."""

import argparse
import csv
import os
import re
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import TINY, randomised, words
from PIL import Image
from stress import fork, wait

import data
import finetune
import weights
from data import draw_images
from model import ConvNeXt
from plumbing.files import save_tensors

ROOT = Path(__file__).parent.parent
CLASSES = ("dots", "rings", "stripes")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    """ROOT/val/<class>/: seven pictures, none of them square, of three classes."""
    root = tmp_path_factory.mktemp("photographs")
    for i, picture in enumerate(draw_images(7, seed=3, size=300)[0]):
        path = root / "val" / CLASSES[i % 3] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        width, height = 140 + 25 * i, 290 - 20 * i
        Image.fromarray(picture[:height, :width]).save(path)
    return root


def network(classes: int = len(CLASSES), stem_stride: int = 4) -> ConvNeXt:
    """Whose logits differ among images by far more than rounding."""
    torch.manual_seed(0)
    net = randomised(ConvNeXt(**TINY, num_classes=classes, stem_stride=stem_stride))
    net.head.weight.data *= 2
    return net


@pytest.fixture(scope="module")
def checkpoint(photographs, tmp_path_factory) -> Path:
    """Of a training on these pictures at 32 pixels."""
    path = tmp_path_factory.mktemp("run") / "checkpoint-best.pth"
    save_tensors(path, ours(photographs, 32, 1))
    return path


def ours(photographs: Path, input_size: int, stem_stride: int) -> dict:
    """A checkpoint as training writes it."""
    flags = words(data_path=photographs, input_size=input_size, stem_stride=stem_stride, scratch=True)
    state = network(stem_stride=stem_stride).state_dict()
    return {"model": state, "classes": list(CLASSES), "config": vars(finetune.get_args(flags))}


def command(checkpoint: Path, output_dir: Path, *images: Path, **flags) -> argparse.Namespace:
    more = words(resume=checkpoint, output_dir=output_dir, device="cpu", num_workers=0, **flags)
    return finetune.get_args(["--predict", *map(str, images), *more])


def predict(checkpoint: Path, output_dir: Path, *images: Path, **flags) -> list[dict]:
    """The rows of predictions.csv."""
    finetune.main(command(checkpoint, output_dir, *images, **flags))
    return read(output_dir)


def read(output_dir: Path) -> list[dict]:
    with open(output_dir / "predictions.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_predictions_are_those_of_a_plain_loop_in_the_order_given(photographs, checkpoint, tmp_path, capsys):
    first = photographs / "val/stripes/2.png"
    rows = predict(checkpoint, tmp_path, first, photographs, batch_size=3)
    paths = [str(first), *sorted(str(path) for path in photographs.rglob("*.png"))]
    assert [row["file"] for row in rows] == paths
    net, (mean, std) = network(stem_stride=1).eval(), (np.array(x, np.float32) for x in data.STATISTICS["folder"])
    for row in rows:
        pixels = np.asarray(Image.open(row["file"]).resize((32, 32), Image.Resampling.BICUBIC), np.float32) / 255  # warped
        with torch.no_grad():
            shares = net(torch.from_numpy((pixels - mean) / std).permute(2, 0, 1)[None]).exp()[0]
        shares = dict(zip(CLASSES, (shares / shares.sum()).tolist()))
        likeliest = sorted(CLASSES, key=shares.get, reverse=True)
        assert [row["class"], row["class_2"], row["class_3"]] == likeliest
        found = [float(row[name]) for name in ("probability", "probability_2", "probability_3")]
        assert found == pytest.approx([shares[name] for name in likeliest], rel=1e-3, abs=1e-5)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0] for line in lines[1:-1]] == paths
    assert lines[-1] == f"wrote predictions.csv of 8 images to {tmp_path}"


def test_batches_of_one_predict_as_batches_of_many(photographs, checkpoint, tmp_path):
    one, many = (predict(checkpoint, tmp_path / str(size), photographs, batch_size=size) for size in (1, 5))
    for a, b in zip(one, many, strict=True):
        assert (a["file"], a["class"], a["class_2"]) == (b["file"], b["class"], b["class_2"])
        assert float(a["probability"]) == pytest.approx(float(b["probability"]), rel=1e-4)
    assert len({row["probability"] for row in one}) == len(one)


def test_unreadable_files_are_named_left_out_and_counted(photographs, checkpoint, tmp_path, capsys):
    (tmp_path / "bad.png").write_text("not an image")
    rows = predict(
        checkpoint, tmp_path / "out", photographs / "val/dots", tmp_path / "bad.png", photographs / "val/rings", batch_size=4
    )
    expected = predict(checkpoint, tmp_path / "good", photographs / "val/dots", photographs / "val/rings", batch_size=4)
    assert [row["file"] for row in rows] == [row["file"] for row in expected] and len(rows) == 5
    for row, other in zip(rows, expected):
        assert float(row["probability"]) == pytest.approx(float(other["probability"]), rel=1e-4)
    output = capsys.readouterr()
    assert output.err.count("cannot read") == 1 and "bad.png" in output.err
    assert "wrote predictions.csv of 5 images (1 could not be read) to" in output.out


def test_topk_classes_are_told_of_each_image(photographs, checkpoint, tmp_path, capsys):
    rows = predict(checkpoint, tmp_path, photographs / "val/dots/0.png", topk=2)
    assert list(rows[0]) == ["file", "class", "probability", "class_2", "probability_2"]
    assert capsys.readouterr().out.splitlines()[1].count("%") == 2


def test_two_processes_predict_every_image_once_in_the_order_given(photographs, checkpoint, tmp_path):
    expected = predict(checkpoint, tmp_path / "one", photographs, batch_size=2)

    def work():
        with open(f"{os.environ['RANK']}.txt", "w") as file, redirect_stdout(file):
            finetune.main(
                command(checkpoint, tmp_path / "two", photographs, batch_size=2)
            )  # the one has 2 and 2 images, the other 2 and 1

    wait(fork(work, tmp_path, 2))
    rows = read(tmp_path / "two")
    assert [row["file"] for row in rows] == [row["file"] for row in expected]
    for row, other in zip(rows, expected, strict=True):
        assert float(row["probability"]) == pytest.approx(float(other["probability"]), rel=1e-4)
    lines = (tmp_path / "0.txt").read_text().splitlines()
    assert [line.split(": ")[0] for line in lines[1:-1]] == [row["file"] for row in rows]
    assert (tmp_path / "1.txt").read_text() == ""


def test_predictions_are_written_beside_the_checkpoint_unless_told_otherwise(photographs, checkpoint, capsys):
    line = ["--predict", str(photographs), "--resume", str(checkpoint), "--device", "cpu", "--num_workers", "0"]
    finetune.main(finetune.get_args(line))
    assert f"to {checkpoint.parent}\n" in capsys.readouterr().out and len(read(checkpoint.parent)) == 7
    finetune.main(finetune.get_args(line))
    assert f"to {checkpoint.parent}, replacing earlier ones\n" in capsys.readouterr().out


# --- one image, three ways


def of_timm(photographs, path):
    torch.save(weights.from_native(network().state_dict(), "timm"), path)


def of_the_authors(photographs, path):
    torch.save({"model": network().state_dict()}, path)


def of_a_training(input_size, stem_stride, photographs, path):
    save_tensors(path, ours(photographs, input_size, stem_stride))


@pytest.mark.parametrize(
    ("write", "name"),
    [
        (partial(of_a_training, 32, 1), "checkpoint-best.pth"),
        (partial(of_a_training, 112, 2), "checkpoint-best.pth"),
        (partial(of_a_training, 224, 4), "checkpoint-best.pth"),
        (of_timm, "model.bin"),
        (of_the_authors, "model.pt"),
    ],
    ids=["ours at 32", "ours at 112", "ours at 224", "timm", "authors"],
)
def test_evaluation_prediction_and_the_lines_of_the_page_give_the_same_logits(photographs, tmp_path, monkeypatch, write, name):
    write(photographs, tmp_path / name)
    paths, found = sorted(str(path) for path in photographs.rglob("*.png")), {}

    def gather(way, images, *flags):
        logits = found[way] = []
        with monkeypatch.context() as patch:
            patch.setattr(ConvNeXt, "__call__", lambda *args: logits.append(torch.nn.Module.__call__(*args)) or logits[-1])
            common = ["--resume", str(tmp_path / name), "--device", "cpu", "--num_workers", "0", "--batch_size", "3"]
            finetune.main(finetune.get_args([way, *images, *common, *flags]))

    gather("--eval", [], "--data_path", str(photographs))
    gather("--predict", paths)
    page = re.search(r"```python\n(.*?)```", (ROOT / "docs/weights.md").read_text(), re.S).group(1)
    for path in paths:
        code = page.replace("runs/finetune/checkpoint-best.pth", str(tmp_path / name)).replace("cat.jpg", path)
        assert code.count(str(tmp_path)) == 1 and code.count(path) == 1
        names = {}
        exec(code, names)
        found.setdefault("page", []).append(names["logits"].detach())
    evaluated, predicted, by_hand = (torch.cat(logits) for logits in found.values())
    assert by_hand.shape == (7, 3) and (by_hand[1:] - by_hand[:-1]).abs().max(dim=1).values.min() > 0.05
    for logits in (evaluated, predicted):
        torch.testing.assert_close(logits, by_hand, rtol=1e-4, atol=1e-4)
