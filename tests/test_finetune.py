"""Claims about finetune.py, plumbing/scores.py, plumbing/optim.py and plumbing/recipes.py."""

import argparse
import json
import re
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import stress
import torch
import torch.nn.functional as F
from helpers import TINY, assert_equal, image_folder, log_of, randomised, read_log, read_table, run, small, words
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import data
import finetune
import plumbing.scores
import pretrain
import weights
from data import Images, evaluation_transform
from model import MODELS, ConvNeXt
from plumbing import dist, plots
from plumbing.files import load_file, save_tensors
from plumbing.scores import write_by_class
from plumbing.shapes import draw_images
from plumbing.tasks import layer_groups, make_optimizer

CLASSES = ["dots", "rings", "stripes"]
MEAN, STD = (np.array(values, np.float32) for values in data.STATISTICS["folder"])
train = partial(run, finetune)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Three classes: 12 training images and 7 validation images in class folders."""
    return image_folder(tmp_path_factory.mktemp("images"), train=12, val=7)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    """A pre-trained encoder, as pretrain.py writes it."""
    torch.manual_seed(7)
    path = tmp_path_factory.mktemp("encoder") / "encoder.pth"
    net = MODELS["convnextv2_atto"](num_classes=0, stem_stride=1)
    save_tensors(path, {"model": net.state_dict(), "config": {"input_size": 16, "data_set": "embedded"}})
    return path


def get_args(**flags) -> argparse.Namespace:
    return finetune.get_args(words(**flags))


def use(task: str, checkpoint: Path, *paths, **flags) -> None:
    """Evaluate or predict with a checkpoint."""
    finetune.main(finetune.get_args([task, *map(str, paths), *words(resume=checkpoint, device="cpu", **flags)]))


# --- recipes ----------------------------------------------------------------------------------------------------------

# The published tables, column by column as they are printed.
TABLES = {
    "in1k": """atto femto pico nano tiny base large huge; epochs 600 600 600 600 300 100 100 50
        blr 2e-4 2e-4 2e-4 2e-4 8e-4 6.25e-4 6.25e-4 1.25e-3; warmup_epochs 0 0 0 0 40 20 20 10
        weight_decay .3 .05 .3 .3 .05 .05 .05 .05; layer_decay .9 .9 .9 .9 .9 .6 .6 .75; drop_path .1 0 0 .1 .2 .1 .2 .3
        mixup 0 .3 .3 .5 .8 .8 .8 .8; cutmix 0 .3 .3 .5 1 1 1 1; smoothing .2 .2 .2 .2 .1 .1 .1 .1""",
    "in22k": """nano tiny base large huge; layer_decay .9 .9 .8 .8 .8; drop_path 0 0 .1 .1 .3
        blr 2.5e-4 2.5e-4 2.5e-4 2.5e-4 2.5e-4""",
    "in22k_to_in1k": """nano tiny base large huge; layer_decay .9 .9 .8 .8 .85; drop_path .1 .1 .2 .3 .5
        epochs 90 90 30 30 30""",
}


@pytest.mark.parametrize(("recipe", "table"), TABLES.items())
def test_recipes_equal_the_published_tables(recipe, table):
    sizes, *rows = (row.split() for row in table.replace("\n", ";").split(";"))
    for k, size in enumerate(sizes):
        args = get_args(recipe=recipe, model=f"convnextv2_{size}", data_path="x")
        assert {name: getattr(args, name) for name, *_ in rows} == {name: float(row[k]) for name, *row in rows}, size


def test_a_recipe_is_complete_and_flags_win(capsys):
    expected = dict(mixup=0.1, epochs=7, warmup_epochs=1)
    args = vars(get_args(recipe="in1k", model="convnextv2_base", data_path="x", **expected))
    assert "from recipe in1k: blr 0.000625, " in capsys.readouterr().out
    expected |= dict(cutmix=1, layer_decay_type="group", model_ema=True, reprob=0.25, aa="rand-m9-mstd0.5-inc1")
    expected |= dict(min_lr=1e-6, model_ema_decay=0.9999, opt_betas=(0.9, 0.999))
    assert {name: args[name] for name in expected} == expected


def test_a_linear_probe_is_moco_v3s():
    """Its released main_lincls.py: SGD at 0.1 per 256 images for 90 epochs, a cosine to zero, crops and flips alone."""
    theirs = dict(opt="sgd", blr=0.1, momentum=0.9, weight_decay=0, epochs=90, warmup_epochs=0, min_lr=0, min_crop=0.08)
    theirs |= dict(aa=None, color_jitter=None, reprob=0, mixup=0, cutmix=0, smoothing=0, drop_path=0, clip_grad=None)
    args = vars(get_args(linear_probe=True, data_path="x"))
    assert {name: args[name] for name in theirs} == theirs and not args["model_ema"]
    assert get_args(linear_probe=True, scratch=True).epochs == 3  # the drawn images stay a matter of minutes


# Written out by hand from the rule: id of downsampling layer i, then of the blocks of stage i, then of the head.
SINGLE = {
    "atto": ([1, 3, 5, 11], [[1, 2], [3, 4], [5, 6, 7, 8, 9, 10], [11, 12]], 13),
    "base": ([1, 4, 7, 34], [[1, 2, 3], [4, 5, 6], list(range(7, 34)), [34, 35, 36]], 37),
}
GROUP = ([0, 2, 3, 12], [[1] * 3, [2] * 3, [3 + j // 3 for j in range(27)], [12] * 3], 13)


@pytest.mark.parametrize(("size", "kind"), [*((size, "single") for size in SINGLE), ("base", "group")])
def test_layers_learning_rates_and_weight_decay_equal_the_written_tables(size, kind):
    downsample, blocks, last = GROUP if kind == "group" else SINGLE[size]
    with torch.device("meta"):
        net = MODELS[f"convnextv2_{size}"]()
    layers = {}
    for name, parameter in net.named_parameters():
        part, i, j, *_ = [*name.split("."), 0, 0]
        table = {"downsample_layers": downsample, "stages": blocks}.get(part)
        layers[parameter] = last if not table else table[int(i)] if table is downsample else table[int(i)][int(j)]
    matrices = {p for name, p in net.named_parameters() if p.ndim > 1 and "grn" not in name}
    for group in layer_groups(net, 0.05, 0.9, kind):
        for parameter in group["params"]:
            assert group["lr_scale"] == pytest.approx(0.9 ** (last - layers.pop(parameter)))
            assert group["weight_decay"] == (0.05 if parameter in matrices else 0.0)
    assert not layers  # each is in one group


@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_sgd_has_nesterovs_momentum(momentum):
    defaults = make_optimizer(argparse.Namespace(opt="sgd", momentum=momentum), [torch.ones(1)]).defaults
    assert (defaults["momentum"], defaults["nesterov"]) == (momentum, momentum > 0)


# --- training ---------------------------------------------------------------------------------------------------------


def test_a_head_for_the_same_classes_is_kept_and_one_for_others_starts_anew(images, tmp_path, small_models):
    first = train(images, tmp_path / "first", epochs=1)["model"]["head.weight"]
    others = image_folder(tmp_path / "others", classes=("waves", "grid", "rays"), train=12, val=6)
    flags = dict(epochs=1, lr=1e-12, min_lr=0, finetune=tmp_path / "first/checkpoint-1.pth")
    same, other = (train(path, tmp_path / path.name, **flags)["model"]["head.weight"] for path in (images, others))
    assert torch.allclose(same, first, atol=1e-6) and not torch.allclose(other, first, atol=1e-3)


def test_a_linear_probe_trains_a_head_alone_on_pretrained_weights(images, encoder, tmp_path, capsys, monkeypatch):
    args = get_args(data_path=images, finetune=encoder)
    assert (args.model, args.stem_stride, args.input_size, args.head_init_scale) == ("convnextv2_atto", 1, 16, 0.001)
    args = get_args(data_path=images, finetune=encoder, recipe="few")
    assert (args.model, args.batch_size, args.aa, args.head_init_scale) == ("convnextv2_atto", 16, None, 1)
    modes, evaluate = [], finetune.evaluate
    monkeypatch.setattr(finetune, "evaluate", lambda net, **k: modes.append(net.training) or evaluate(net, **k))
    state = train(images, tmp_path, finetune=encoder, linear_probe=True, lr=1e-2, head_init_scale=1)
    assert all(torch.equal(state["model"][key], value) for key, value in load_file(encoder)["model"].items())
    assert len(state["optimizer"]["state"]) == 2 and modes == [False, False]  # before each evaluation
    assert re.search(rf"{encoder}: (.|\n)* 963 of them trained", capsys.readouterr().out)  # 320 x 3 and 3


def test_two_processes_train_and_evaluate_as_one_with_twice_the_batch(images, tmp_path, small_models):
    """Of the 7 images to evaluate on one process gets 4 and the other 3."""
    args = finetune.get_args(small(finetune, images, tmp_path / "two", batch_size=2))
    stress.wait(stress.fork(lambda: finetune.main(args), tmp_path, 2))
    one, two = train(images, tmp_path / "one"), load_file(tmp_path / "two/checkpoint-2.pth")
    assert_equal(two["model"], one["model"], rtol=1e-4, atol=2e-5)
    for a, b in zip(*(stress.untimed(read_log(tmp_path / name)) for name in ("one", "two")), strict=True):
        assert b == pytest.approx(a, rel=1e-4)


def test_fine_tuning_starts_from_what_was_pre_trained_on_the_same_data(images, encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(finetune, "OURS", str(encoder))
    assert (get_args().finetune, get_args(scratch=True).finetune) == (str(encoder), None)
    sizes = [get_args(**flags).input_size for flags in ({}, {"input_size": 24}, {"linear_probe": True})]
    assert sizes == [32, 24, 16]  # a frozen encoder reads images of the size that it was pre-trained with
    assert get_args().head_init_scale == get_args(scratch=True).head_init_scale == 1.0
    assert get_args(data_path="x").finetune is None and get_args(data_set="cifar10").finetune is None
    run(pretrain, images, tmp_path, epochs=1)
    monkeypatch.setattr(finetune, "OURS", f"{tmp_path}/encoder.pth")
    args = get_args(data_path=images)
    assert (args.finetune, args.input_size, args.stem_stride) == (finetune.OURS, 32, 1)
    assert get_args(data_path=images, scratch=True).finetune is get_args().finetune is None


# --- scores -----------------------------------------------------------------------------------------------------------

# The position of each image's label in the network's order: 0 counts for top-1, up to 4 for top-5.
POSITIONS = [0, 1, 0, 4, 1, 5, 2, 1, 0, 6, 1, 3, 1]


@torch.no_grad()
def logits_of(net: ConvNeXt, array: np.ndarray, size: int = 16) -> torch.Tensor:
    """(classes,) of a single image, warped to a square."""
    pixels = np.asarray(Image.fromarray(array).resize((size, size), Image.Resampling.BICUBIC), np.float32) / 255
    return net.eval()(torch.from_numpy((pixels - MEAN) / STD).permute(2, 0, 1)[None])[0]


@pytest.fixture
def scored(tmp_path) -> tuple[ConvNeXt, Images, dict, list]:
    """A network; 13 images and one that cannot be read; scores and outcomes by a naive count over single images."""
    torch.manual_seed(0)
    net = randomised(ConvNeXt(**TINY, num_classes=7, stem_stride=1))
    arrays, paths = draw_images(13, seed=0, size=20)[0], [f"{tmp_path}/{k}.png" for k in range(13)]
    for array, path in zip(arrays, paths):
        Image.fromarray(array).save(path)
    logits = torch.stack([logits_of(net, array) for array in arrays])  # (13, 7)
    ranked = logits.argsort(dim=1, descending=True)
    labels, predicted = ranked[range(13), POSITIONS], ranked[:, 0]
    (tmp_path / "bad.png").write_text("not an image")
    items = [*paths[:5], f"{tmp_path}/bad.png", *paths[5:]], [*labels[:5].tolist(), 0, *labels[5:].tolist()]
    images = Images(*items, list("abcdefg"), evaluation_transform(16, 1.0), data.STATISTICS["folder"])
    scores = {f"top{k}": 100 * sum(position < k for position in POSITIONS) / 13 for k in (1, 5)}
    recalls = [(predicted == k)[labels == k].float().mean().item() for k in labels.unique()]
    scores |= {"balanced": 100 * np.mean(recalls), "loss": F.cross_entropy(logits, labels).item()}
    return net, images, scores, sorted(torch.stack([labels, predicted], dim=1).tolist())


SETTINGS = [(1, 1, True), (1, 4, True), (1, 100, True), (2, 4, True), (2, 4, False)]


@pytest.mark.parametrize(("processes", "batch_size", "divide"), SETTINGS)
def test_scores_equal_a_naive_count_of_readable_images(scored, tmp_path, processes, batch_size, divide):
    """Each of two processes evaluates half of the images, or all of them."""
    net, images, expected, pairs = scored
    settings = argparse.Namespace(batch_size=batch_size, amp=None, num_workers=0, dist_eval=divide)

    def work():
        torch.set_num_threads(1)
        counts, device = [], dist.setup("cpu")
        net.train().register_forward_pre_hook(lambda _, inputs: counts.append(len(inputs[0])))
        scores, outcomes = finetune.evaluate(net, images, settings, device)
        results = [scores, sorted(outcomes.tolist()), sum(counts), net.training]
        Path(f"{dist.rank()}.json").write_text(json.dumps(results))

    stress.wait(stress.fork(work, tmp_path, processes))
    for rank in range(processes):
        scores, *results = json.loads((tmp_path / f"{rank}.json").read_text())
        assert scores == pytest.approx(expected, rel=1e-4)
        assert results == [pairs, 14 // processes if divide else 14, True]  # in training, as before
    output = (tmp_path / "output.txt").read_text()
    assert "warning: cannot read" in output and output.count("1 of 14 images cannot be read and are left out") == 1


def test_the_tables_by_class_equal_a_histogram(tmp_path, monkeypatch):
    names = ["class", "b, c", "images", "none"]  # names like columns', with a comma, of no images; and one is missing
    outcomes = torch.randint(3, (50, 2), generator=torch.Generator().manual_seed(0))
    outcomes[7] = torch.tensor([1, 4])
    write_by_class(tmp_path / "new", outcomes, names)
    names.append("(output 4)")
    confusion = np.histogram2d(*outcomes.T.numpy(), bins=range(6))[0].astype(int)
    rows = read_table(tmp_path / "new/confusion.csv")
    assert list(rows[0]) == ["true / predicted", *names]
    assert [[*row.values()] for row in rows] == [[name, *map(str, row)] for name, row in zip(names, confusion)]
    for k, row in enumerate(read_table(tmp_path / "new/classes.csv")):
        count, correct = confusion[k].sum(), confusion[k, k]
        accuracy = f"{100 * correct / count:.6g}" if count else ""
        assert row == {"class": names[k], "images": str(count), "correct": str(correct), "accuracy": accuracy}
    monkeypatch.setattr(plumbing.scores, "MOST_CLASSES", 4)  # with more, there is no table of all pairs
    write_by_class(tmp_path / "many", outcomes, names)
    assert [path.name for path in (tmp_path / "many").iterdir()] == ["classes.csv"]


@pytest.mark.parametrize("classes", [3, 300])
def test_the_plot_shows_fractions_of_each_class_and_names_only_a_few(drawn, tmp_path, monkeypatch, classes, recwarn):
    figures, save = [], plots.save_figure
    monkeypatch.setattr(plumbing.scores, "save_figure", lambda *args: figures.append(args[0]) or save(*args))
    outcomes = torch.randint(classes, (5 * classes, 2), generator=torch.Generator().manual_seed(0))
    names = ["caf\udce9", *(f"日本 {k}" for k in range(1, classes))]  # no Unicode, and what the font lacks
    write_by_class(tmp_path, outcomes, names)
    axes, counts = figures[0].axes[0], np.histogram2d(*outcomes.T.numpy(), bins=range(classes + 1))[0]
    expected = 100 * counts / counts.sum(axis=1, keepdims=True).clip(min=1)
    np.testing.assert_allclose(axes.images[0].get_array(), expected, rtol=1e-6)
    labels = [text.get_text() for text in axes.get_yticklabels()]
    assert ("日本 2 (7)" in labels) == (classes == 3) and len(labels) <= 40 and len(axes.texts) <= 9
    assert 400 < min(Image.open(tmp_path / "confusion.png").size) < 1500 and not recwarn.list


# --- checkpoints and what uses them -----------------------------------------------------------------------------------


class NoFloat64(TorchDispatchMode):
    """As on MPS: making a tensor of float64 is an error."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            assert not isinstance(tensor, torch.Tensor) or tensor.dtype != torch.float64, func
        return result


def test_outputs_and_their_evaluation(images, tmp_path, capsys, drawn, small_models, monkeypatch):
    monkeypatch.setattr(torch.amp.GradScaler, "_lazy_init_scale_growth_tracker", lambda *_: None)  # never enabled here
    with NoFloat64():
        state = train(images, tmp_path, model_ema=True, mixup=0.8, cutmix=1.0, drop_path=0.1, clip_grad=1.0)
    names = {"checkpoint-1.pth", "checkpoint-2.pth", "checkpoint-best.pth", "log.jsonl", "config.json", "accuracy.png"}
    assert {path.name for path in tmp_path.iterdir()} == names | {"classes.csv", "confusion.csv", "confusion.png"}
    assert min(Image.open(tmp_path / "accuracy.png").size) > 300
    best = load_file(tmp_path / "checkpoint-best.pth")
    assert state["classes"] == best["classes"] == CLASSES and "top1" in best and state["config"]["nb_classes"] == 3
    last = read_log(tmp_path)[-1]
    with NoFloat64():
        use("--eval", tmp_path / "checkpoint-2.pth", data_path=images)
    out = capsys.readouterr().out
    for name, key in (("model", "val"), ("model_ema", "val_ema")):
        top1, balanced, loss = (last[f"{key}_{score}"] for score in ("top1", "balanced", "loss"))
        scores = f"top-1 {top1:.2f}%, balanced {balanced:.2f}%, top-5 100.00%, loss {loss:.4f}"
        assert f"\n{name}: {scores} on 7 images of {images}, at 16 px (whole, warped" in out
    keys = "top1", "balanced", "top5", "loss"
    for tops in ((1, 5), (5, 1)):
        results = [(dict.fromkeys(keys, float(top)), torch.zeros(top, 2, dtype=torch.int64)) for top in tops]
        monkeypatch.setattr(finetune, "evaluate", Mock(side_effect=results))
        use("--eval", tmp_path / "checkpoint-2.pth")
        assert read_table(tmp_path / "classes.csv")[0]["images"] == "5"  # of the weights or the average, the better


def test_a_folder_of_classes_is_evaluated_on_what_was_held_out(images, tmp_path, capsys, small_models):
    folder, checkpoint = images / "train", tmp_path / "run/checkpoint-2.pth"
    state = train(folder, tmp_path / "run", holdout=0.5)
    assert state["classes"] == CLASSES and state["config"]["images"] == 6
    loss = f"loss {log_of(tmp_path / 'run', 'val_loss')[-1]:.4f}"
    for flags in ({}, dict(data_path=folder)):
        use("--eval", checkpoint, **flags)
        assert f"{loss} on 6 images of {folder} (50% of each class, held out)" in capsys.readouterr().out
    use("--eval", checkpoint, eval_data_path=folder)
    assert f"on 12 images of {folder}, at" in capsys.readouterr().out  # named as images to evaluate on, they are
    train(images, tmp_path / "tuned", holdout=0.5, epochs=1)  # of a folder with a split to validate on
    use("--eval", tmp_path / "tuned")
    assert f"on 7 images of {images}, at" in capsys.readouterr().out


def test_of_a_runs_folder_the_best_weights_or_the_newest_are_taken(images, encoder, tmp_path, small_models):
    train(images, tmp_path, epochs=1)
    assert get_args(finetune=encoder.parent).finetune == str(encoder)
    best = tmp_path / "checkpoint-best.pth"
    assert get_args(finetune=tmp_path).finetune == get_args(eval=True, resume=tmp_path).resume == str(best)
    best.unlink()
    assert get_args(predict=["x.jpg"], resume=tmp_path).resume == f"{tmp_path}/checkpoint-1.pth"


# --- prediction -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    """Seven images, none of them square."""
    root = tmp_path_factory.mktemp("photographs")
    for i, array in enumerate(draw_images(7, seed=3, size=150)[0]):
        Image.fromarray(array[: 145 - 10 * i, : 70 + 12 * i]).save(root / f"{i}.png")
    return root


def network(stem_stride: int = 4, seed: int = 0) -> ConvNeXt:
    """Whose logits differ among images by far more than floating-point error."""
    torch.manual_seed(seed)
    net = randomised(ConvNeXt(**TINY, num_classes=3, stem_stride=stem_stride), seed)
    net.head.weight.data *= 2
    return net


def save_checkpoint(path: Path, content: dict, **flags) -> Path:
    """A checkpoint as training on a folder writes it."""
    args = get_args(data_path=path.parent, scratch=True, **flags)
    save_tensors(path, content | {"classes": CLASSES, "config": vars(args)})
    return path


@pytest.mark.parametrize(("processes", "size", "topk"), [(1, 1, 2), (1, 3, 5), (2, 2, 5)])
def test_predictions_are_a_plain_loops_in_the_order_given(photographs, tmp_path, processes, size, topk):
    """Of a training at 32 pixels, of whose weights the average counts."""
    content = {"model": network(1, seed=1).state_dict(), "model_ema": network(1).state_dict()}
    checkpoint = save_checkpoint(tmp_path / "a.pth", content, input_size=32, stem_stride=1)
    bad, first = tmp_path / "bad.png", photographs / "2.png"
    bad.write_text("not an image")
    flags = dict(output_dir=tmp_path, batch_size=size, topk=topk, num_workers=0)
    predict = partial(use, "--predict", checkpoint, first, bad, photographs, **flags)
    stress.wait(stress.fork(predict, tmp_path, processes))
    rows, paths = read_table(tmp_path / "predictions.csv"), [first, *sorted(photographs.glob("*.png"))]
    columns = ["file", "class", "probability", "class_2", "probability_2", "class_3", "probability_3"]
    for row, path in zip(rows, paths, strict=True):
        probabilities = dict(zip(CLASSES, logits_of(network(1), np.asarray(Image.open(path)), 32).softmax(0).tolist()))
        ranked, (file, *values) = sorted(CLASSES, key=probabilities.get, reverse=True)[:topk], row.values()
        assert file == str(path) and list(row) == columns[: 1 + 2 * len(ranked)] and values[::2] == ranked
        expected = pytest.approx([probabilities[name] for name in ranked], rel=1e-3, abs=1e-5)
        assert [float(value) for value in values[1::2]] == expected
    output = (tmp_path / "output.txt").read_text()
    assert output.count("9 images at 32 px (whole, warped to the square), normalised as folder\n") == 1  # one prints
    lines = [line.split(": ")[0] for line in output.splitlines() if line.count("%") == len(ranked)]
    assert lines == [str(path) for path in paths]


@pytest.mark.parametrize("origin", ["ours", "timm"])
def test_predictions_are_those_of_the_lines_of_the_page(photographs, tmp_path, origin):
    state_dict, file = network().state_dict(), tmp_path / "weights.pth"
    if origin == "ours":
        save_checkpoint(file, {"model": state_dict}, input_size=112, crop_pct=0.8)
    else:
        torch.save(weights.from_native(state_dict, "timm"), file)
    use("--predict", file, photographs, num_workers=0)
    rows = read_table(tmp_path / "predictions.csv")  # beside the checkpoint, unless told otherwise
    page = (Path(__file__).parent.parent / "docs/weights.md").read_text()
    page = re.search(r"```python\n(.*?)```", page, re.DOTALL).group(1)
    for row in rows:
        code = page.replace("runs/finetune/checkpoint-best.pth", str(file)).replace("cat.jpg", row["file"])
        assert code.count(str(file)) == code.count(row["file"]) == 1
        names = {}
        exec(code, names)
        probability, index = names["logits"].softmax(dim=1)[0].max(dim=0)
        assert row["class"] == (CLASSES[index] if origin == "ours" else f"class {index}")
        assert float(row["probability"]) == pytest.approx(probability.item(), rel=1e-4)
    assert len({row["probability"] for row in rows}) == 7
