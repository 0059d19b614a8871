"""Claims about bench.py: every task measures what it says. Times themselves are never asserted."""

import csv
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from helpers import save_noise

import bench
from fcmae import FCMAE, random_mask
from model import ConvNeXt
from plumbing.files import save_csv

SMALL = [
    "--model",
    "convnextv2_atto",
    "--batch_size",
    "1",
    "--input_size",
    "32",
    "--stem_stride",
    "1",
    "--amp",
    "none",
    "--repeats",
    "1",
    "--device",
    "cpu",
]


@pytest.mark.parametrize(("task", "rows"), [("encoder", 4), ("step", 3), ("sweep", 6), ("finetune", 2), ("segment", 4)])
def test_every_task_writes_its_table(task, rows, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "SWEEP", (0.6, 0.4))
    if task == "segment":
        pytest.importorskip("transformers")
    more = ["--batch_size", "2", "--stem_stride", "4"] if task == "segment" else []  # of one image, BatchNorm makes nothing
    bench.main(bench.get_args([task, *SMALL, *more, "--output_dir", str(tmp_path)]))
    with open(tmp_path / f"{task}.csv") as file:
        table = list(csv.DictReader(file))
    assert len(table) == rows and all(float(row["ms"]) > 0 for row in table)
    assert (tmp_path / f"{task}.png").exists() == (task in ("encoder", "sweep"))
    assert f"{task}.csv" in capsys.readouterr().out


def test_the_input_pipeline_is_measured_on_a_folder(tmp_path):
    for i in range(4):
        save_noise(tmp_path / f"images/{i}.jpg")
    bench.main(
        bench.get_args(
            [
                "data",
                "--data_path",
                str(tmp_path / "images"),
                "--num_workers",
                "0",
                "--input_size",
                "16",
                "--output_dir",
                str(tmp_path),
            ]
        )
    )
    assert (tmp_path / "data.csv").read_text().count("\n") == 2


def test_heap_divides_the_times_of_processes_without_it_by_those_with_it(tmp_path, monkeypatch):
    def measured(words, env, **_):
        words = dict(pairwise(words))
        assert (words["--input_size"], words["--stem_stride"], words["--batch_size"]) == ("32", "1", "1")
        ms = {"kept": 10, "default": 12}[env["HEAP"]]
        save_csv(Path(words["--output_dir"], "encoder.csv"), [dict(candidate="sparse", ms=ms), dict(candidate="dense", ms=ms * ms)])

    monkeypatch.setattr(bench.subprocess, "run", measured)
    bench.main(bench.get_args(["heap", *SMALL, "--output_dir", str(tmp_path)]))
    with open(tmp_path / "heap.csv") as file:
        assert {row["candidate"]: row["ratio"] for row in csv.DictReader(file)} == {"sparse": "1.2", "dense": "1.44"}


def test_checkpointed_activations_give_the_same_gradients_and_keep_far_less():
    imgs, labels = torch.randn(4, 3, 64, 64), torch.arange(4)
    mask = random_mask(4, 8, 8, 0.6)
    for version, backend in ((2, "sparse"), (2, "masked"), (2, "leaky"), (2, None), (1, "sparse"), (1, None)):
        results = {}
        for enable in (False, True):
            torch.manual_seed(0)
            classes = 0 if backend else 4
            net = ConvNeXt((2, 2, 2, 2), (8, 16, 32, 64), version, classes, stem_stride=1, drop_path_rate=0.5)
            net.checkpoint_activations(enable)
            mae = FCMAE(net, backend=backend, decoder_embed_dim=8) if backend else None

            def loss(mae=mae, net=net):
                torch.manual_seed(1)  # of stochastic depth
                return mae(imgs, mask)[0] if mae else torch.nn.functional.cross_entropy(net(imgs), labels)

            kept = bench.memory(lambda loss=loss: loss().backward(), torch.device("cpu"))
            results[enable] = kept, [p.grad for p in (mae or net).parameters()]
        assert results[True][0] < 0.5 * results[False][0]
        assert all(torch.equal(a, b) for a, b in zip(results[True][1], results[False][1]))


def test_sparse_keeps_less_for_backward_than_masked():
    encoder = ConvNeXt((1, 1, 1, 1), (8, 16, 32, 64), num_classes=0, stem_stride=1)
    imgs, kept = torch.randn(2, 3, 64, 64), {}
    for backend in ("sparse", "masked"):
        mae = FCMAE(encoder, mask_ratio=0.75, backend=backend, decoder_embed_dim=8)
        mask = torch.ones(2, 8, 8, dtype=torch.bool)
        mask[:, :4, :4] = False
        kept[backend] = bench.memory(
            lambda mae=mae, mask=mask: mae.forward_encoder(imgs, mask).sum().backward(), torch.device("cpu")
        )
    assert kept["sparse"] < 0.5 * kept["masked"]
