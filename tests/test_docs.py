"""Claims about README and docs: commands parse, and run on fewer and smaller images; links and examples are good."""

import argparse
import importlib
import re
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import image_folder, save_noise, write_coco, write_maps

import data
from model import MODELS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "results").rglob("*.md"))]
SCRIPT = re.compile(r"(?:python|torchrun)(?: --\S+)* (?:-m (experiments\.\w+)|(\w+)\.py)(.*)")


def commands():
    """Page, module and arguments of every command that runs one of our scripts."""
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ").replace("\\|", "|")
        lines = [line for line in text.split("\n") if line.startswith("    ")] + re.findall(r"`([^`\n]+)`", text)
        for line in lines:
            for part in re.split(r"&&|;", line.split("   #")[0]):
                if match := SCRIPT.match(part.strip()):
                    yield page.name, match[1] or match[2], *shlex.split(match[3].replace("SEED", "0"), comments=True)


COMMANDS = list(dict.fromkeys(commands()))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_parses(command, monkeypatch):
    _page, name, *words = command
    parse = argparse.ArgumentParser.parse_args

    def parse_once(*args):
        parse(*args)
        raise StopIteration

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_once)
    with pytest.raises(StopIteration):
        importlib.import_module(name).get_args(words)


def test_there_are_commands_for_every_script_and_links_lead_to_files():
    assert {name for _, name, *_ in COMMANDS} >= {"pretrain", "finetune", "detect", "segment", "analyze", "weights"}
    for page in PAGES:
        prose = re.sub(r"```.*?```|`[^`]*`|^    .*?$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", prose):
            assert link.startswith("http") or (page.parent / link).exists(), (page.name, link)


def test_the_readme_example_runs():
    torch.manual_seed(0)
    for block in re.findall(r"```python\n(import.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL):
        names = {}
        exec(block, names)
        assert names["pred"].shape == (2, 49, 3072) and names["mask"].dtype == torch.bool


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
    for path, model in (("W", "convnextv2_yocto"), ("encoder.pth", "convnextv2_base")):
        torch.save(MODELS[model](num_classes=3).state_dict(), path)
    links = {"W": "FILE FILE_OR_URL", "encoder.pth": "runs/base/encoder.pth runs/base_1k/checkpoint-best.pth"}
    links |= {"DIR": "IMAGENET COCO ADE20K CIFAR10 PHOTOS PENNFUDAN CAMVID FOLDER"}
    links |= {"runs/v2": "runs/v1", "runs/finetune": "runs/scratch"}
    for target, paths in links.items():
        for path in map(Path, paths.split()):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(Path(target).resolve())
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
