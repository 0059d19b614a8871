"""Scores of classifiers and segmenters; tables of a classifier's accuracy by class, confusion and predictions."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from plumbing import dist
from plumbing.files import make_directory, save_csv
from plumbing.plots import new_figure, save_figure

MOST_CLASSES = 2000  # at most, for the confusion table: ImageNet-22k's would have 500 million entries


def classification_scores(
    results: Iterable[tuple[torch.Tensor, torch.Tensor]], device: torch.device, divided: bool
) -> tuple[dict[str, float], torch.Tensor]:
    """Score batches of logits (N, classes) and labels (N,): accuracies in percent, and the cross-entropy "loss".

    Accuracies are "top1", "top5" and "balanced", top-1's mean over classes. Also returns the outcomes (images, 2), on
    the CPU: each image's true and predicted class. With `divided`, processes hold different images; all are counted.
    """
    sums = [torch.zeros(3, device=device)]  # by batch; Python adds them up in float64, which MPS lacks
    outcomes = [torch.zeros(0, 2, device=device, dtype=torch.int64)]
    for logits, labels in results:
        best = logits.topk(min(5, logits.shape[1])).indices  # (N, 5)
        hits, loss = best == labels[:, None], F.cross_entropy(logits, labels, reduction="sum")
        sums.append(torch.stack([loss, hits[:, 0].sum(), hits.any(dim=1).sum()]))
        outcomes.append(torch.stack([labels, best[:, 0]], dim=1))
    mine = [math.fsum(column) for column in zip(*torch.stack(sums).tolist())], torch.cat(outcomes).cpu()
    sums, outcomes = zip(*(dist.gather(mine) if divided else [mine]))
    (loss, top1, top5), outcomes = map(math.fsum, zip(*sums)), torch.cat(outcomes)
    count, (truth, predicted) = len(outcomes), outcomes.unbind(1)
    images, hits = truth.bincount(), truth[truth == predicted].bincount(minlength=int(truth.max()) + 1)
    balanced = (hits / images)[images > 0].mean().item()
    scores = {"loss": loss / count, "top1": 100 * top1 / count, "balanced": 100 * balanced, "top5": 100 * top5 / count}
    return scores, outcomes


def segmentation_scores(confusion: torch.Tensor, classes: Sequence[str]) -> dict:
    """Score pixel counts (true, predicted): mIoU, accuracy, mean accuracy and IoU by class, as float64 fractions.

    A class that neither occurs nor is predicted has no IoU (None), an absent class no accuracy; means omit these.
    """
    confusion = confusion.double()
    hits, true, predicted = confusion.diagonal(), confusion.sum(dim=1), confusion.sum(dim=0)
    iou, accuracy = hits / (true + predicted - hits), hits / true  # 0 / 0 is NaN
    by_class = {name: None if math.isnan(value) else value for name, value in zip(classes, iou.tolist())}
    means = {"mIoU": iou.nanmean(), "accuracy": hits.sum() / true.sum(), "mean_accuracy": accuracy.nanmean()}
    return {name: value.item() for name, value in means.items()} | {"IoU_by_class": by_class}


def write_by_class(directory: Path, outcomes: torch.Tensor, classes: Sequence[str]) -> None:
    """Write classes.csv and, up to `MOST_CLASSES` classes, confusion.csv and confusion.png.

    outcomes: (images, 2), each image's true class and the predicted one, which may lie beyond the named `classes`.
    """
    make_directory(directory)
    truth, predicted = outcomes.unbind(1)
    n = max(len(classes), int(outcomes.max()) + 1)
    names = [*classes, *(f"(output {k})" for k in range(len(classes), n))]
    counts = [truth.bincount(minlength=n).tolist(), truth[truth == predicted].bincount(minlength=n).tolist()]
    table = [
        {"class": name, "images": images, "correct": correct, "accuracy": 100 * correct / images if images else ""}
        for name, images, correct in zip(names, *counts)
    ]
    save_csv(directory / "classes.csv", table)
    if n <= MOST_CLASSES:
        confusion = (n * truth + predicted).bincount(minlength=n * n).view(n, n)
        # No folder name, and so no class name, has a slash.
        rows = [{"true / predicted": name} | dict(zip(names, row)) for name, row in zip(names, confusion.tolist())]
        save_csv(directory / "confusion.csv", rows)
        draw_confusion(directory / "confusion.png", confusion, names)


def draw_confusion(path: Path, confusion: torch.Tensor, names: list[str]) -> None:
    """Draw counts (true, predicted) as percent of each true class's images; `names` are the classes'."""
    n, images = len(names), confusion.sum(dim=1)
    percent = 100 * confusion / images[:, None].clamp(min=1)
    side = min(10, 4 + 0.25 * n)  # inches
    figure, [[axis]] = new_figure(1, 1, side + 1.6, side)
    from matplotlib.colors import PowerNorm  # as matplotlib in `new_figure`, only when it is needed

    root = PowerNorm(0.5, vmin=0, vmax=100)  # a linear scale would show rare confusions as white, like zero
    shades = axis.imshow(percent.numpy(), cmap="Blues", norm=root)
    figure.colorbar(shades, label="% of the true class's images", shrink=0.8)
    axis.set(xlabel="predicted class", ylabel="true class (images)")
    if n <= 40:  # more names would not be legible; ticks then number the rows of classes.csv, from 0
        short = [name if len(name) <= 20 else f"{name[:19]}…" for name in names]
        short = [name.encode(errors="backslashreplace").decode() for name in short]  # folders' may be invalid Unicode
        axis.set_xticks(range(n), short, rotation=90)
        axis.set_yticks(range(n), [f"{name} ({count})" for name, count in zip(short, images.tolist())])
    if n <= 15:
        for i, j in confusion.nonzero().tolist():
            colour = "white" if percent[i, j] > 30 else "black"
            axis.text(j, i, f"{percent[i, j]:.0f}", ha="center", va="center", color=colour)
    save_figure(figure, path)


def predictions(paths: Sequence[str], logits: torch.Tensor, classes: Sequence[str], topk: int) -> list[dict]:
    """Make rows of predictions.csv for paths and their logits (N, classes): file, class, probability, class_2, ..."""
    best = logits.softmax(dim=1).topk(topk)
    rows = [{"file": path} for path in paths]
    for row, probabilities, indices in zip(rows, best.values.tolist(), best.indices.tolist()):
        for rank, (probability, index) in enumerate(zip(probabilities, indices), 1):
            suffix = f"_{rank}" if rank > 1 else ""
            row |= {f"class{suffix}": classes[index], f"probability{suffix}": probability}
    return rows


def describe_prediction(row: dict) -> str:
    """Put a row of `predictions` into words."""
    path, *values = row.values()
    return f"{path}: {', '.join(f'{name} {value:.1%}' for name, value in zip(values[::2], values[1::2]))}"
