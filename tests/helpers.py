"""What many tests need: small images on disk, short command lines, runs in this process, and ways to stop them."""

import csv
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import finetune
import pretrain
from plumbing.files import find_checkpoints, load_file
from plumbing.shapes import SHAPES, TEXTURES, draw_images, draw_scenes

CPU = torch.device("cpu")
TINY = dict(depths=(1, 1, 2, 1), dims=(8, 16, 32, 64))  # a network that tests can afford


class Code:
    """What no file of weights may hold: a pickle that runs code when it is loaded."""

    def __reduce__(self):
        return pytest.fail, ("the code ran",)


def randomised(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Every parameter drawn anew, so that none is hidden by its initial zero or one."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return module


def layer_groups(net: torch.nn.Module, layer_decay: float, weight_decay: float) -> list[dict]:
    """Optimiser groups of one parameter each, around an encoder of four blocks; `factor` is of the learning rate."""
    groups, layers = [], dict(downsample_layers=(0, 2, 3, 4), stages=(1, 2, 3, 4))
    for name, parameter in net.named_parameters():
        part, index, *_ = name.removeprefix("backbone.").removeprefix("encoder.").split(".")
        factor = layer_decay ** (5 - layers[part][int(index)]) if part in layers else 1
        decay = weight_decay if parameter.ndim > 1 and not name.endswith((".gamma", ".beta")) else 0.0
        groups.append(dict(params=[parameter], factor=factor, weight_decay=decay))
    return groups


# --- images ---------------------------------------------------------------------------------------------------------


def save_noise(path: Path, size: tuple[int, int] = (40, 30), mode: str = "RGB", **options) -> None:
    """The same noise every time, (width, height) pixels of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(0).integers(256, size=(size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(values).convert(mode).save(path, **options)


def image_folder(root: Path, classes: tuple = ("stripes", "rings", "dots"), size: int = 32, **splits: int) -> Path:
    """ROOT/<split>/<class>/<i>.png of drawn images, as many as `train=12, val=7` say, dealt to the classes in turn."""
    per_class = -(-sum(splits.values()) // len(classes)) + len(splits)
    images, labels = draw_images(50 * -(-per_class // 5), seed=0, size=size)  # 50 have 5 of each class
    drawn = {name: iter(images[labels == TEXTURES.index(name)]) for name in classes}
    for split, count in splits.items():
        for i, name in zip(range(count), itertools.cycle(classes)):
            path = root / split / name / f"{i:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(next(drawn[name])).save(path)
    return root


def write_coco(root: Path, split: str, count: int, seed: int, size: int = 48, change=lambda data_set: None) -> dict:
    """Drawn images and their objects in COCO's layout under `root`; `change` works on the annotations first."""
    from plumbing.coco import embedded_annotations

    images, kinds, masks = draw_scenes(count, seed, size)
    data_set = embedded_annotations(kinds, masks, SHAPES, 20)
    folder = root / f"{split}2017"
    folder.mkdir(parents=True)
    for row, image in zip(data_set["images"], images):
        row["file_name"] = f"{row['id']:03}.png"
        Image.fromarray(image).save(folder / row["file_name"])
    change(data_set)
    (root / "annotations").mkdir(exist_ok=True)
    (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(data_set))
    return data_set


def write_maps(root: Path, split: str, count: int, seed: int, size: int = 48) -> tuple[np.ndarray, np.ndarray]:
    """Drawn images and their maps of labels in ADE20K's layout under `root`: uint8 (n, S, S, 3) and (n, S, S)."""
    images, kinds, masks = draw_scenes(count, seed, size)
    labels = np.sum((kinds[:, :, None, None] + 1) * masks, axis=1).astype(np.uint8)  # masks do not overlap
    for kind, arrays in (("images", images), ("annotations", labels)):
        folder = root / kind / split
        folder.mkdir(parents=True)
        for index, array in enumerate(arrays):
            Image.fromarray(array).save(folder / f"{index:03}.png")
    (root / "classes.txt").write_text("\n".join(["ground", *SHAPES]))
    return images, labels


# --- runs -------------------------------------------------------------------------------------------------------------

SMALL = dict(input_size=16, stem_stride=1, batch_size=4, epochs=2, warmup_epochs=1, lr=1e-3, num_workers=0)
SMALL |= dict(log_every=1, device="cpu")
FLAGS = {
    pretrain: SMALL | dict(input_size=32, decoder_embed_dim=16, disable_eval=True),
    finetune: SMALL | dict(model="convnextv2_atto", aa="none", reprob=0),
}


def words(**flags) -> list[str]:
    """A command line: `words(lr=0.1, betas=(0.9, 1), clip_grad=None)` -> ["--lr=0.1", "--betas", "0.9", "1"]."""
    line = []
    for name, value in flags.items():
        if isinstance(value, list | tuple):
            line += [f"--{name}", *map(str, value)]
        elif value is not None:
            line.append(f"--{name}={value}")
    return line


def small(script, data_path: Path, output_dir: Path, **flags) -> list[str]:
    """The command line of a run of seconds on the images of a folder."""
    return words(data_path=data_path, output_dir=output_dir, **FLAGS[script] | flags)


def run(script, data_path: Path, output_dir: Path, **flags) -> dict:
    """Such a run, in this process; its last checkpoint."""
    script.main(script.get_args(small(script, data_path, output_dir, **flags)))
    return load_file(find_checkpoints(output_dir)[-1])


def read_log(directory: Path, *keys: str) -> list:
    """The records of a run's log.jsonl; with `keys` their values, without one of them None."""
    records = [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
    return [[record.get(key) for key in keys] for record in records] if keys else records


def log_of(directory: Path, key: str) -> list:
    """A log's values of one key, of the records that have it."""
    return [record[key] for record in read_log(directory) if key in record]


def read_table(path: Path) -> list[dict]:
    """The rows of a CSV file."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# --- interruptions ----------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """As if the process had been killed: nothing is saved."""


def kill() -> None:
    """End the run at once."""
    raise Killed


def call_at(monkeypatch, module, name: str, turn: int, act=kill) -> None:
    """Call `act()` before the `turn`-th call of module.name."""
    original, calls = getattr(module, name), itertools.count(1)

    def patched(*args, **kwargs):
        if next(calls) == turn:
            act()
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, patched)


def assert_equal(a: dict, b: dict, rtol: float = 0, atol: float = 0) -> None:
    """The same names, and the same tensors: to the bit without a tolerance."""
    torch.testing.assert_close(dict(a), dict(b), rtol=rtol, atol=atol)
