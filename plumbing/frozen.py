"""Frozen features of a network, layer by layer, and how well linear probes and nearest neighbours classify with them.

Shapes: N images, H x W sites, L = H * W, C channels, K classes, D feature dimensions.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plumbing.files import UserError


def layer_names(model: nn.Module, where: str) -> list[str]:
    """List the layers that `where` names: "act", "grn" or "block" of all blocks, or a single layer.

    "stages.2.1.act" is after GELU and "stages.2.1.grn" after GRN, both 4C wide (the same in V1); "stages.2.1" is the
    output of the block, C wide; "norm" is the pooled and, with a head, normalised feature vector. UserError for others.
    """
    blocks = [f"stages.{i}.{j}" for i, depth in enumerate(model.depths) for j in range(depth)]
    kinds = {"act": [f"{block}.act" for block in blocks], "grn": [f"{block}.grn" for block in blocks], "block": blocks}
    if where not in {"norm", *kinds, *blocks, *kinds["act"], *kinds["grn"]}:
        raise UserError(f"no layer {where!r}; try norm, or one of {', '.join(blocks)}, alone or with .act or .grn")
    return kinds.get(where, [where])


@torch.no_grad()
def collect_features(
    model: nn.Module, loader: Iterable, where: str | Sequence[str], measure: Callable = lambda features: features
) -> tuple[dict[str, Tensor], Tensor]:
    """Run `model` over `loader` and keep `measure` of every layer's features, on the CPU.

    loader: batches of (images (B, 3, S, S), labels (B,)).
    where: one or several names that `layer_names` knows.
    measure: (B, H, W, C) -> (B, ...), or (B, D) -> (B, ...) for "norm". It runs as soon as a layer is computed, so only
        one batch's features exist at a time. By default the features themselves, for few images.
    Returns {layer: (N, ...)} in the network's order, and the labels (N,).
    """
    names = [name for part in ([where] if isinstance(where, str) else where) for name in layer_names(model, part)]
    measured, labels = {name: [] for name in names}, []

    def keep(name, module, inputs, output):
        features = output.permute(0, 2, 3, 1) if name.count(".") == 2 else output  # of a block -> (B, H, W, C)
        measured[name].append(measure(features).cpu())

    with ExitStack() as hooks:  # removed at the end
        for name in names:
            hooks.enter_context(model.get_submodule(name).register_forward_hook(partial(keep, name)))
        for imgs, batch_labels in loader:
            model.forward_features(imgs)
            labels.append(batch_labels)
    return {name: torch.cat(parts) for name, parts in measured.items()}, torch.cat(labels)


def flat(features: Tensor) -> Tensor:
    """(N, H, W, C) or (N, L, C) -> (N, L, C), at least float32: sums of squares overflow float16."""
    return features.flatten(1, -2).to(torch.promote_types(features.dtype, torch.float32))  # (N, H, W, C) -> (N, L, C)


def mean_and_std(features: Tensor) -> Tensor:
    """Mean and standard deviation over space: (N, H, W, C) -> (N, 2 C)."""
    std, mean = torch.std_mean(flat(features), dim=1, correction=0)
    return torch.cat([mean, std], dim=1)


def stage_ends(model: nn.Module) -> list[str]:
    """List the layers that end the four stages."""
    return [f"stages.{i}.{depth - 1}" for i, depth in enumerate(model.depths)]


def score(bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor) -> dict[str, float]:
    """Classify `queries` (N, D) by `bank` (M, D); accuracies in percent: "probe" and "knn", by the 10 nearest."""
    probe, (x, y) = ridge_accuracy(bank, bank_labels, queries, labels), standardised(bank, queries)
    return {"probe": 100 * probe, "knn": 100 * knn_accuracy(x, bank_labels, y, labels)}


def standardised(bank: Tensor, *others: Tensor) -> list[Tensor]:
    """Shift and scale features (M, D) and others (N, D), in float64, to zero mean and unit variance over `bank`."""
    std, mean = torch.std_mean(bank.double(), dim=0, correction=0)
    return [(part.double() - mean) / torch.where(std == 0, 1, std) for part in (bank, *others)]


def knn_accuracy(bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor, k: int = 10) -> float:
    """Return the fraction of `queries` (N, D) whose class wins the vote of the `k` nearest of `bank` (M, D).

    Nearest by cosine similarity s; a vote weighs exp(s / 0.07), as is usual for frozen features (Wu et al. 2018).
    """
    similarity, nearest = (F.normalize(queries, dim=1) @ F.normalize(bank, dim=1).T).topk(min(k, len(bank)))  # (N, k)
    votes = similarity.new_zeros(len(queries), int(bank_labels.max()) + 1)  # (N, K)
    votes.scatter_add_(1, bank_labels[nearest], (similarity / 0.07).exp())
    return (votes.argmax(dim=1) == labels).double().mean().item()


def ridge_accuracy(bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor, strength: float = 0.01) -> float:
    """Return the accuracy on `queries` (N, D) of a linear layer fitted to `bank` (M, D); labels (N,) and (M,).

    Closed-form ridge regression of one-hot classes on standardised features, with `strength` x M added to the diagonal
    of their products: nothing is tuned or random.
    """
    x, queries = standardised(bank, queries)
    targets = F.one_hot(bank_labels).double()  # (M, K)
    products = x.T @ x + strength * len(x) * torch.eye(x.shape[1], dtype=torch.float64)  # (D, D)
    weight = torch.linalg.solve(products, x.T @ (targets - targets.mean(dim=0)))  # (D, K)
    return ((queries @ weight + targets.mean(dim=0)).argmax(dim=1) == labels).double().mean().item()
