"""What a classifier gets right and what it confuses, class by class, and what it makes of single images: tables and a picture.

A segmenter's scores too.
"""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from plumbing.files import save_csv
from plumbing.plots import new_figure, save_figure
from plumbing.processes import Processes
from plumbing.script import one_line

MOST = 2000  # classes whose confusion is written: for ImageNet-22k's, a table of half a thousand million cells would help nobody


def scores_of(results: Iterable[tuple[torch.Tensor, torch.Tensor]], processes: Processes, divided: bool) -> dict:
    """Of batches of logits (N, classes) and labels (N,): top-1 and top-5 accuracy in percent, cross-entropy "loss", and "images".

    "outcomes", (images, 2) on the CPU, are the class of every image and the one predicted. When the images are `divided` among
    processes, all of that is of the images of all.
    """
    sums = [torch.zeros(3, device=processes.device)]  # of each batch; Python adds them up in float64, which MPS lacks
    outcomes = [torch.zeros(0, 2, device=processes.device, dtype=torch.int64)]
    for logits, labels in results:
        best = logits.topk(min(5, logits.shape[1])).indices  # (N, 5)
        hits, loss = best == labels[:, None], F.cross_entropy(logits, labels, reduction="sum")
        sums.append(torch.stack([loss, hits[:, 0].sum(), hits.any(dim=1).sum()]))
        outcomes.append(torch.stack([labels, best[:, 0]], dim=1))
    mine = [math.fsum(column) for column in zip(*torch.stack(sums).tolist())], torch.cat(outcomes).cpu()
    sums, outcomes = zip(*(processes.gather(mine) if divided else [mine]))
    (loss, top1, top5), outcomes = map(math.fsum, zip(*sums)), torch.cat(outcomes)
    count = len(outcomes)
    return {"loss": loss / count, "top1": 100 * top1 / count, "top5": 100 * top5 / count, "images": count, "outcomes": outcomes}


def segmentation_scores(confusion: torch.Tensor, classes: Sequence[str]) -> dict:
    """Of counts (true, predicted) of pixels: mIoU, accuracy, mean accuracy and IoU by class, as shares, in float64.

    A class that neither occurs nor is predicted has no IoU (None), one that does not occur no accuracy; means are over the others.
    """
    confusion = confusion.double()
    right, true, predicted = confusion.diagonal(), confusion.sum(dim=1), confusion.sum(dim=0)
    iou, accuracy = right / (true + predicted - right), right / true  # 0 / 0 is NaN
    by_class = {name: None if math.isnan(value) else value for name, value in zip(classes, iou.tolist())}
    numbers = {"mIoU": iou.nanmean(), "accuracy": right.sum() / true.sum(), "mean_accuracy": accuracy.nanmean()}
    return {name: value.item() for name, value in numbers.items()} | {"IoU_by_class": by_class}


def better(scores: dict[str, dict]) -> str:
    """The name of the score with the higher top-1 accuracy, the first of equal ones."""
    return max(scores, key=lambda name: scores[name]["top1"])


def by_class(outcomes: torch.Tensor, classes: Sequence[str]) -> dict[str, tuple]:
    """Name of a file -> (save, content), for save(path, content): classes.csv; up to `MOST` classes confusion.csv, confusion.png.

    outcomes: (images, 2), the class of every image and the one predicted, which may lie beyond the named `classes`.
    """
    truth, predicted = outcomes.unbind(1)
    n = max(len(classes), int(outcomes.max()) + 1)
    names = [*classes, *(f"(output {k})" for k in range(len(classes), n))]
    counts = [truth.bincount(minlength=n).tolist(), truth[truth == predicted].bincount(minlength=n).tolist()]
    table = [
        {"class": name, "images": images, "correct": correct, "accuracy": 100 * correct / images if images else ""}
        for name, images, correct in zip(names, *counts)
    ]
    files = {"classes.csv": (save_csv, table)}
    if n <= MOST:
        confusion = (n * truth + predicted).bincount(minlength=n * n).view(n, n)
        # No folder, and so no class, has a slash in its name.
        rows = [{"true / predicted": name} | dict(zip(names, row)) for name, row in zip(names, confusion.tolist())]
        files |= {"confusion.csv": (save_csv, rows), "confusion.png": (draw_confusion, (confusion, names))}
    return files


def draw_confusion(path: Path, content: tuple[torch.Tensor, list[str]]) -> None:
    """Write confusion.png of a matrix (true, predicted) of counts and the names of its rows: percent of each class's images."""
    confusion, names = content
    n = len(names)
    percent = 100 * confusion / confusion.sum(dim=1, keepdim=True).clamp(min=1)
    side = min(10, 4 + 0.25 * n)  # inches
    figure, axes = new_figure(1, 1, side + 1.6, side)
    from matplotlib.colors import PowerNorm  # as matplotlib in `new_figure`: only when a picture is due

    roots = PowerNorm(0.5, vmin=0, vmax=100)  # on a linear scale, what is rarely confused would be as white as what never is
    picture = axes[0, 0].imshow(percent.numpy(), cmap="Blues", norm=roots)
    figure.colorbar(picture, label="% of the true class's images", shrink=0.8)
    axes[0, 0].set(xlabel="predicted class", ylabel="true class")
    if n <= 40:  # more names would not be legible; the ticks are then numbers, counted as the rows of classes.csv from 0
        short = [name if len(name) <= 20 else f"{name[:19]}…" for name in map(one_line, names)]
        axes[0, 0].set_xticks(range(n), short, rotation=90)
        axes[0, 0].set_yticks(range(n), short)
    if n <= 15:
        for i, j in confusion.nonzero().tolist():
            colour = "white" if percent[i, j] > 30 else "black"
            axes[0, 0].text(j, i, f"{percent[i, j]:.0f}", ha="center", va="center", color=colour)
    save_figure(figure, path)


def predictions(paths: Sequence[str], logits: torch.Tensor, classes: Sequence[str], topk: int) -> list[dict]:
    """For each path and row of logits (N, classes) a row of predictions.csv: file, class, probability, class_2, probability_2, ..."""
    endings = ["", *(f"_{k}" for k in range(2, topk + 1))]
    best = logits.softmax(dim=1).topk(topk)
    rows = []
    for path, shares, likeliest in zip(paths, best.values.tolist(), best.indices.tolist()):
        row = {"file": path}
        for ending, share, k in zip(endings, shares, likeliest):
            row |= {f"class{ending}": classes[k], f"probability{ending}": share}
        rows.append(row)
    return rows


def describe_prediction(row: dict) -> str:
    """A row of `predictions` as a line to print."""
    path, *likeliest = row.values()
    return one_line(f"{path}: {', '.join(f'{name} {share:.1%}' for name, share in zip(likeliest[::2], likeliest[1::2]))}")
