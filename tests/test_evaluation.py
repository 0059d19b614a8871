"""Claims about how finetune.py scores classifiers, against a naive count; what it keeps of them; and that they learn."""

import argparse
import json
import math
import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import stress
import torch
from helpers import ALONE, TINY, assert_equal, picture_folder, randomised, run
from PIL import Image

import finetune
from data import STATISTICS, Images, draw_images, evaluation_transform
from model import MODELS, ConvNeXt
from plumbing.files import find_checkpoints, load_file
from plumbing.log import read_log
from plumbing.processes import setup_processes

CLASSES = 7
# Where in the network's order each picture's label stands: 0 is counted by top-1, up to 4 by top-5.
RANKS = [0, 1, 0, 4, 1, 5, 2, 1, 0, 6, 1, 3, 1]
SETTINGS = argparse.Namespace(batch_size=4, amp=None, num_workers=0, dist_eval=True, data_set="folder")


def classifier() -> ConvNeXt:
    torch.manual_seed(0)
    return randomised(ConvNeXt(**TINY, num_classes=CLASSES, stem_stride=1))


@torch.no_grad()
def logits_of(net: ConvNeXt, picture: np.ndarray) -> list[float]:
    """Of a single picture."""
    mean, std = (np.array(values, dtype=np.float32) for values in STATISTICS["folder"])
    pixels = np.asarray(Image.fromarray(picture).resize((16, 16), Image.Resampling.BICUBIC), dtype=np.float32) / 255
    image = torch.from_numpy((pixels - mean) / std).permute(2, 0, 1)[None]  # (1, 3, 16, 16)
    return net.eval()(image)[0].tolist()


@pytest.fixture
def pictures() -> tuple[ConvNeXt, list[np.ndarray], list[int]]:
    """A network, 13 pictures, and labels of the ranks above."""
    net, found = classifier(), list(draw_images(13, seed=0, size=20)[0])
    labels = []
    for picture, rank in zip(found, RANKS):
        logits = logits_of(net, picture)
        labels.append(sorted(range(CLASSES), key=lambda k: -logits[k])[rank])
    return net, found, labels


def count_naively(net: ConvNeXt, pictures: list[np.ndarray], labels: list[int]) -> dict:
    top1 = top5 = loss = 0
    for picture, label in zip(pictures, labels):
        logits = logits_of(net, picture)
        better = sum(other > logits[label] for other in logits)
        top1 += better < 1
        top5 += better < 5
        loss += math.log(sum(math.exp(other) for other in logits)) - logits[label]
    n = len(labels)
    return {"loss": loss / n, "top1": 100 * top1 / n, "top5": 100 * top5 / n, "images": n}


def as_images(pictures, labels) -> Images:
    names = [str(k) for k in range(CLASSES)]
    return Images(pictures, labels, names, evaluation_transform(16, 1.0), STATISTICS["folder"])


@pytest.mark.parametrize("batch_size", [1, 4, 13, 100])  # 4, 4, 4 and 1 images, for one
def test_scores_equal_a_naive_count_over_single_images(pictures, batch_size):
    net, found, labels = pictures
    expected = count_naively(net, found, labels)
    assert [round(expected[key] * 13 / 100) for key in ("top1", "top5")] == [3, 11]  # top-2 would be 8
    settings = argparse.Namespace(**vars(SETTINGS) | {"batch_size": batch_size})
    score = finetune.evaluate(net.train(), as_images(np.stack(found), labels), settings, ALONE)
    assert score == pytest.approx(expected, rel=1e-4) and net.training


def test_an_image_that_cannot_be_read_is_left_out_of_the_scores(pictures, tmp_path, capsys):
    net, found, labels = pictures
    paths = [tmp_path / f"{i:02}.png" for i in range(13)]
    for path, picture in zip(paths, found):
        Image.fromarray(picture).save(path)
    paths[5].write_text("not an image")
    score = finetune.evaluate(net, as_images(list(map(str, paths)), labels), SETTINGS, ALONE)
    readable = [i for i in range(13) if i != 5]
    assert score == pytest.approx(count_naively(net, [found[i] for i in readable], [labels[i] for i in readable]), rel=1e-4)
    assert "05.png" in capsys.readouterr().err


@pytest.mark.parametrize("divide", [True, False])
def test_two_processes_count_every_image_once_or_each_of_them_all(pictures, tmp_path, divide):
    net, found, labels = pictures
    settings = argparse.Namespace(**vars(SETTINGS) | {"dist_eval": divide})
    forwarded = []

    def work():
        torch.set_num_threads(1)
        net.register_forward_pre_hook(lambda _, inputs: forwarded.append(len(inputs[0])))
        score = finetune.evaluate(net, as_images(np.stack(found), labels), settings, setup_processes("cpu"))
        Path(f"{os.environ['RANK']}.json").write_text(json.dumps([score, sum(forwarded)]))

    assert [os.waitpid(pid, 0)[1] for pid in stress.fork(work, tmp_path, 2)] == [0, 0], (tmp_path / "output.txt").read_text()
    results = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for score, _ in results:
        assert score == pytest.approx(count_naively(net, found, labels), rel=1e-4)
    assert [count for _, count in results] == ([7, 6] if divide else [13, 13])


# --- what is kept -----------------------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch):
    """A network for seconds instead of minutes bears the name of the smallest one."""
    monkeypatch.setitem(MODELS, "convnextv2_atto", partial(ConvNeXt, (1, 1, 1, 1), (16, 32, 48, 64), version=2))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return picture_folder(tmp_path_factory.mktemp("pictures"), train=8, val=3, size=20)


@pytest.mark.parametrize(
    ("scores", "best"),  # top-1 of the weights and of their average after each epoch; which of them are the best
    [
        ([(50, 60), (40, 55)], (1, "model_ema")),
        ([(60, 50), (40, 55)], (1, "model")),
        ([(50, 60), (61, 40)], (2, "model")),
        ([(60, 50), (50, 61)], (2, "model_ema")),
        ([(60, 60), (60, 60)], (1, "model")),
    ],
)
def test_the_best_checkpoint_holds_the_weights_or_the_average_that_scored_best(small, folder, tmp_path, monkeypatch, scores, best):
    tops = iter([top for pair in scores for top in pair])
    monkeypatch.setattr(finetune, "evaluate", lambda *_: dict(loss=1.0, top1=next(tops), top5=100.0, images=3))
    run(finetune, folder, tmp_path, model_ema=True)
    epoch, name = best
    states = [load_file(path) for path in find_checkpoints(tmp_path)]
    kept, expected = load_file(tmp_path / "checkpoint-best.pth"), states[epoch - 1][name]
    assert_equal(kept["model"], expected)
    others = [state[key] for state in states for key in ("model", "model_ema") if state[key] is not expected]
    assert all(stress.difference(kept["model"], other) for other in others)
    assert (kept["epoch"], kept["top1"]) == (epoch, max(map(max, scores)))


# --- learning ---------------------------------------------------------------------------------------------------------


def test_fine_tuning_from_scratch_tells_held_out_pictures_apart(small, tmp_path):
    """Three textures, 120 pictures of each to learn from and 60 others to be told apart: 77% when this was written, 33% is chance."""
    root = picture_folder(tmp_path / "pictures", ("stripes", "shading", "dots"), train=360, val=180)
    flags = dict(input_size=32, stem_stride=2, batch_size=24, epochs=24, warmup_epochs=1, lr=4e-3, log_every=15)
    run(finetune, root, tmp_path / "run", eval_freq=24, save_ckpt_freq=24, **flags)
    assert read_log(tmp_path / "run")[-1]["val_top1"] > 60
