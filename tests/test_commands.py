"""The claim that README's and docs' commands run as they stand there, if fewer and smaller images make them shorter."""

import importlib
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import image_folder, save_noise, write_coco, write_maps
from test_docs import COMMANDS

import data
from model import MODELS

SHORTER = {
    "pretrain": "--epochs 1 --embedded_images 40 20 --input_size 64 --num_workers 0",
    "finetune": "--epochs 1 --embedded_images 400 20 --input_size 64 --num_workers 0",
    "detect": "--epochs 1 --embedded_images 8 4 --batch_size 2 --input_size 64 --test_size 64 96 --num_workers 0",
    "segment": "--iterations 2 --embedded_images 8 4 --batch_size 2 --input_size 64 --test_size 64 --num_workers 0",
    "analyze": "--num_images 6",
    "experiments.bench": "--model convnextv2_atto --repeats 1 --batch_size 1 --input_size 128",
    "experiments.reproduce": "--dry_run",
}


@pytest.mark.slow
def test_every_command_of_readme_and_docs_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = image_folder(Path("DIR"), train=12, val=6)
    for split, count in (("train", 6), ("val", 3)):
        write_coco(folder, split, count, seed=0)
    for split in ("training", "validation", "test"):
        write_maps(folder, split, 4, seed=0)
    save_noise(Path("IMAGE"), format="PNG")
    for name in ("IMAGENET", "COCO", "ADE20K", "CIFAR10", "PHOTOS", "PENNFUDAN", "CAMVID", "FOLDER"):
        os.symlink("DIR", name)
    for model, *paths in (
        ("convnextv2_yocto", "W", "FILE", "FILE_OR_URL"),
        ("convnextv2_base", "encoder.pth", "runs/base/encoder.pth", "runs/base_1k/checkpoint-best.pth"),
    ):
        torch.save(MODELS[model](num_classes=3).state_dict(), paths[0])
        for path in map(Path, paths[1:]):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(Path(paths[0]).resolve())
    for name, other in (("v2", "v1"), ("finetune", "scratch")):
        os.symlink(name, f"runs/{other}")
    cifar = SimpleNamespace(data=np.zeros((40, 32, 32, 3), np.uint8), targets=[0, 1] * 20, classes=["cat", "dog"])
    monkeypatch.setattr(data.datasets, "CIFAR10", lambda *args, **flags: cifar)  # without the network
    for page, name, *words in COMMANDS:
        if name in SHORTER and words[-2:] != ["DIR", "DIR"]:  # curves of any two runs
            print(page, name, *words)
            script, starts = importlib.import_module(name), not {"--output_dir", "--eval", "--predict"} & {*words}
            if starts and name != "analyze":  # a run of its own, which does not go on with the last one
                shutil.rmtree(f"runs/{name}", ignore_errors=True)
            shorter = [] if "curves" in words else SHORTER[name].split()
            script.main(script.get_args(words + shorter))
    for path in ("classes/predictions.csv", "v2/encoder.pth", "camvid_test/scores.json"):
        assert Path("runs", path).exists(), path
