"""Look at what a network learned: the paper's figures and measures, from checkpoints.

    python analyze.py reconstruct                                      # after `python pretrain.py`
    python analyze.py collapse --checkpoint runs/v2 runs/v1 --label V2 V1
    python analyze.py curves runs/*

Each command writes a figure, and its numbers as CSV, to --output_dir. Features come from the dense network on whole,
unmasked images. In a notebook, use the functions of the first two sections.

Shapes: N images, H x W sites, L = H * W, C channels, K classes, D feature dimensions.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle, product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.utils import make_grid

import data
import weights
from data import Images, center_transform, denormalise, load_images, normalise
from fcmae import FCMAE
from model import GRN, ConvNeXt, check_size
from plumbing import cli, dist, frozen
from plumbing.files import UserError, file_of_run, save_csv, value_errors_are_the_users
from plumbing.frozen import collect_features, flat, layer_names, mean_and_std
from plumbing.loading import mix_seed
from plumbing.plots import COLOURS, draw_panels, new_figure, save_figure
from plumbing.shapes import DRAWN, SPLITS
from pretrain import make_autoencoder, reconstruction_panels

INPUT_SIZES = {"embedded": 48, "folder": 224, "cifar10": 32, "cifar100": 32}  # where a checkpoint does not say
DEPTH_LABEL = "normalised layer index\n(0 first block, 1 last block)"


# --- measures ---------------------------------------------------------------------------------------------------------


def cosine_distance(features: torch.Tensor) -> torch.Tensor:
    """Feature cosine distance of each image (paper Sec. 4): (N, H, W, C) or (N, L, C) -> (N,).

    The mean of (1 - cos(X_i, X_j)) / 2 over pairs i != j of nonzero channels: 0 if all are alike, 0.5 if they are
    orthogonal, NaN without a pair. The paper also averages over i = j, which multiplies this by (C - 1) / C.
    """
    maps = flat(features)  # (N, H, W, C) -> (N, L, C)
    norms = torch.linalg.vector_norm(maps, dim=1, keepdim=True)  # (N, 1, C)
    units = torch.where(norms == 0, 0, maps / norms)
    live = (norms != 0).sum(dim=(1, 2))  # (N,)
    # The sum of all cosines is the squared length of the sum of the unit vectors: no C x C matrix is formed.
    cosines = units.sum(dim=2).square().sum(dim=1) - live  # (N, L) -> (N,): over ordered pairs i != j
    return torch.where(live < 2, torch.nan, (1 - cosines / (live * (live - 1))) / 2)


def dead_channels(features: torch.Tensor, threshold: float = 0.01) -> torch.Tensor:
    """(N, H, W, C) -> (N, C) boolean: channels whose norm is at most `threshold` of the image's mean channel norm."""
    norms = channel_norms(features)
    return norms <= threshold * norms.mean(dim=1, keepdim=True)


def saturated_channels(features: torch.Tensor, threshold: float = 0.1) -> torch.Tensor:
    """(N, H, W, C) -> (N, C) boolean: live channels stuck at one value, which carry no spatial information.

    Their std over space is at most `threshold` of their mean's magnitude, whatever its sign, as GELU is also flat near
    its minimum of -0.17. Meaningless on a map of a single site.
    """
    std, mean = torch.std_mean(flat(features), dim=1, correction=0)  # (N, L, C) -> (N, C)
    return (std <= threshold * mean.abs()) & ~dead_channels(features)


def effective_rank(features: torch.Tensor) -> torch.Tensor:
    """(N, H, W, C) -> (N,): the dimensions that each image's channels span, from 1 to the smaller of H x W and C.

    The exponential of the entropy of the singular values as fractions of their sum (Roy and Vetterli 2007).
    """
    maps = flat(features)  # (N, H, W, C) -> (N, L, C)
    short = maps if maps.shape[1] < maps.shape[2] else maps.mT  # its square has the fewer eigenvalues
    values = torch.linalg.eigvalsh(short @ short.mT).clamp(min=0).sqrt()  # (N, min(L, C))
    return torch.special.entr(values / values.sum(dim=1, keepdim=True)).sum(dim=1).exp()


def channel_norms(features: torch.Tensor) -> torch.Tensor:
    """(N, H, W, C) -> (N, C): each channel's L2 norm over space, G(X) of GRN (paper Alg. 1)."""
    return torch.linalg.vector_norm(flat(features), dim=1)


def mean_activity(features: torch.Tensor) -> torch.Tensor:
    """(N, H, W, C) -> (N, C): the mean over space of the positive part, never negative, as `selectivity` needs."""
    return flat(features).relu().mean(dim=1)


def selectivity(activity: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Class selectivity index of each channel: activity (N, C), not negative, and labels (N,) -> (C,).

    (mu_max - mu_rest) / (mu_max + mu_rest): mu_max is the highest class mean of the activity, mu_rest the mean over the
    other classes. 1: active for one class only; 0: equally for all; NaN: silent. ValueError for fewer than two classes.
    """
    classes = labels.unique()
    if len(classes) < 2:
        raise ValueError(f"selectivity compares classes, and these images have {len(classes)}; take more, of several")
    means = torch.stack([activity[labels == k].mean(dim=0) for k in classes])  # (K, C)
    highest = means.amax(dim=0)
    rest = (means.sum(dim=0) - highest) / (len(classes) - 1)
    return (highest - rest) / (highest + rest)  # 0 / 0 is NaN: silent for every class


# --- networks ---------------------------------------------------------------------------------------------------------


def load_network(path: str | Path, device: torch.device | str = "cpu") -> ConvNeXt:
    """Load the encoder or classifier of any checkpoint that weights.py reads, in eval mode; UserError for others."""
    return weights.build(weights.to_native(weights.read_file(path))).to(device).eval()


def load_mae(path: str | Path, device: torch.device | str = "cpu") -> FCMAE:
    """Load the autoencoder of a checkpoint of pretrain.py, in eval mode; UserError when it holds no decoder."""
    state = weights.read_file(path)
    if "mask_token" not in state:
        raise UserError(f"{path} holds no decoder; reconstruct needs a checkpoint-<epoch>.pth of pretrain.py")
    mae = make_autoencoder(argparse.Namespace(**weights.read_config(path)))
    mae.load_state_dict(state)
    return mae.to(device).eval()


def batches(
    images: Images, indices: list[int], statistics: tuple, batch_size: int, device: torch.device
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield normalised images (B, 3, S, S) on `device` and their labels (B,), skipping unreadable images."""
    for pixels, labels in data.load_batches(images, indices, batch_size):
        yield normalise(pixels, statistics, device), labels


# --- networks and images to study -------------------------------------------------------------------------------------


class Subject(NamedTuple):
    """A network under study: its name and colour in figures, and the statistics that normalise its images."""

    label: str
    colour: str
    statistics: tuple
    model: ConvNeXt | FCMAE


def open_subjects(args: argparse.Namespace, device: torch.device, load: Callable = load_network) -> list[Subject]:
    """Load the networks of --checkpoint and, with --untrained, add the first one with random weights."""
    paths, labels = args.checkpoint, args.label
    if not labels:
        labels = [path.parent.name if path.stem.startswith(("checkpoint-", "encoder")) else path.stem for path in paths]
        labels = labels if len(set(labels)) == len(labels) else [str(path) for path in paths]
    configs, models = [weights.read_config(path) for path in paths], [load(path, device) for path in paths]
    if args.untrained:
        torch.manual_seed(args.seed)
        layer_scale = configs[0].get("layer_scale_init_value", 1e-6)
        model = weights.build(models[0].state_dict(), load=False, layer_scale_init_value=layer_scale)
        labels, configs, models = [*labels, "untrained"], [*configs, configs[0]], [*models, model.to(device).eval()]
    for label, model in zip(labels, models):
        if model.in_chans != 3:
            raise UserError(f"{label} takes images of {model.in_chans} channels, and the data sets here have 3")
        with value_errors_are_the_users():
            check_size(args.input_size, args.input_size, model.patch_size)
    statistics = [data.STATISTICS.get(config.get("data_set"), data.STATISTICS[args.data_set]) for config in configs]
    return [Subject(*fields) for fields in zip(labels, cycle(COLOURS), statistics, models)]


def choose_images(
    args: argparse.Namespace, count: int | None, usual: int, split: str = "val"
) -> tuple[Images, list[int]]:
    """Open the data set, or --images, and choose `count` indices by the seed (default: `usual`; of --images, all)."""
    transform = center_transform(args.input_size)
    if args.images:
        paths = data.find_images(args.images, "--images", args.image_max)
        images, source, usual = Images(paths, None, None, transform, None), "--images", None
    else:
        if args.data_set == "folder" and not data.split_folder(args.data_path, "val"):
            split = "train"
        drawn = max(count or 0, DRAWN[SPLITS.index(split)])
        images = load_images(args.data_set, args.data_path, split, transform, count=drawn)
        source = f"{args.data_set} ({split})"
    images.image_max = args.image_max
    if count and count > len(images):
        raise UserError(f"--num_images {count}, but {source} has {len(images):,}; ask for at most that many")
    indices = data.choose(len(images), count or usual, args.seed)
    print(f"{len(indices):,} of {len(images):,} images of {source} at {args.input_size} px")
    return images, indices


def images_to_show(args: argparse.Namespace, usual: int) -> dict[int, torch.Tensor]:
    """Read chosen images, index -> uint8 (3, S, S), skipping unreadable ones."""
    images, indices = choose_images(args, args.num_images, usual)
    pixels = {index: images[0, index][0] for index in indices}
    return {index: image for index, image in pixels.items() if not images.unreadable[index]}


def study(args: argparse.Namespace, subject: Subject, images: Images, indices: list[int], where, measure: Callable):
    """Run `collect_features` on one subject and chosen images."""
    device = next(subject.model.parameters()).device
    loader = batches(images, indices, subject.statistics, args.batch_size, device)
    return collect_features(subject.model, loader, where, measure)


# --- commands: (args, subjects) -> a figure, and the rows of a table --------------------------------------------------


def reconstruct(args: argparse.Namespace, subjects: list[Subject]) -> tuple:
    """Original, visible patches, prediction, and both together (paper Fig. 2)."""
    columns, names, rows = {}, [], []
    images, ratios = images_to_show(args, usual=4), args.mask_ratio or [None]
    for (index, pixels), ratio, subject in product(images.items(), ratios, subjects):
        mae = subject.model
        mae.mask_ratio = mae.mask_ratio if ratio is None else ratio
        seed = mix_seed("mask", args.seed, index)  # for every ratio: a higher one also hides what a lower one hides
        imgs = normalise(pixels[None], subject.statistics, mae.mask_token.device)  # (1, 3, S, S)
        with torch.no_grad(), value_errors_are_the_users():
            panels = reconstruction_panels(mae, imgs, torch.Generator().manual_seed(seed))
            loss, _, mask = mae(imgs, generator=torch.Generator().manual_seed(seed))
        for title, panel in panels.items():
            columns.setdefault(title, []).append(denormalise(panel, subject.statistics))
        names.append((f"{subject.label}\n" if len(subjects) > 1 else "") + f"{mae.mask_ratio:.0%} hidden")
        row = dict(checkpoint=subject.label, image=index, mask_ratio=mae.mask_ratio)
        rows.append(row | dict(hidden_patches=mask.sum().item(), patches=mask.numel(), loss=loss.item()))
    normalised = any(subject.model.norm_pix_loss for subject in subjects)
    caption = "each patch's true mean and contrast are given,\nits structure is predicted" if normalised else ""
    return draw_panels({title: torch.cat(parts) for title, parts in columns.items()}, caption, names), rows


def collapse(args: argparse.Namespace, subjects: list[Subject]) -> tuple:
    """Cosine distance, dead and saturated channels, effective rank of 4C-wide features (paper Sec. 4, Fig. 4)."""
    images, indices = choose_images(args, args.num_images, usual=1000)
    quantities = {  # column: (title, y axis)
        "cosine_distance": ("feature cosine distance", "0: all channels alike, 0.5: orthogonal"),
        "dead_percent": ("dead channels", "% (norm below 1% of the mean)"),
        "saturated_percent": ("saturated channels", "% (std below 10% of the mean)"),
        "effective_rank": ("effective rank", "dimensions"),
    }

    def measure(features):
        percent = [100 * kind(features).float().mean(dim=1) for kind in (dead_channels, saturated_channels)]
        return torch.stack([cosine_distance(features), *percent, effective_rank(features)], dim=1)  # (N, 4)

    (figure, axes), rows = new_figure(1, 4, 17, 4.8), []
    for subject in subjects:
        kinds = {"act": "after GELU"} | ({"grn": "after GRN"} if subject.model.version == 2 else {})
        features, _ = study(args, subject, images, indices, list(kinds), measure)
        for kind, tensor in kinds.items():
            names = layer_names(subject.model, kind)
            values, x = np.stack([features[name].numpy() for name in names]), np.linspace(0, 1, len(names))
            mean, std = np.nanmean(values, axis=1), np.nanstd(values, axis=1)  # (layers, N, 4) -> (layers, 4)
            style = "--" if kind == "act" and len(kinds) == 2 else "-"
            for k, axis in enumerate(axes[0]):
                plot(axis, x, mean[:, k], f"{subject.label}, {tensor}", subject.colour, style)
                low, high = mean[:, k] - std[:, k], mean[:, k] + std[:, k]
                axis.fill_between(x, low.clip(min=0), high, color=subject.colour, alpha=0.12, linewidth=0)
            for i, name in enumerate(names):
                row = dict(checkpoint=subject.label, layer=name, tensor=tensor, normalised_index=x[i])
                row |= {f"{quantity}_mean": value for quantity, value in zip(quantities, mean[i])}
                rows.append(row | {f"{quantity}_std": value for quantity, value in zip(quantities, std[i])})
    for axis, (title, label) in zip(axes[0], quantities.values()):
        tidy(axis, DEPTH_LABEL, label, title)
        axis.set_ylim(bottom=min(axis.get_ylim()[0], 0.4) if axis is axes[0, 0] else 0)
    return finish(figure, f"mean and std over {len(indices):,} images"), rows


def activations(args: argparse.Namespace, subjects: list[Subject]) -> tuple:
    """64 channel maps of one layer as small squares, checkpoints side by side on the same image (paper Fig. 3)."""
    images, rows = images_to_show(args, usual=1), []
    figure, axes = new_figure(len(images), 1 + len(subjects), 4.6 * len(subjects) + 3.5, 0.4 + 4.1 * len(images))
    for (index, pixels), (image_axis, *map_axes) in zip(images.items(), axes):
        image_axis.imshow(pixels.permute(1, 2, 0).numpy())
        image_axis.set_title("image", fontsize=13)
        for axis, subject in zip(map_axes, subjects):
            kind = "grn" if subject.model.version == 2 else "act"
            layer = args.layer or f"stages.2.{subject.model.depths[2] - 1}.{kind}"
            if layer == "norm" or layer_names(subject.model, layer) != [layer]:
                raise UserError(f"--layer {layer} is not a single layer with maps; give one such as stages.2.0.grn")
            imgs = normalise(pixels[None], subject.statistics, next(subject.model.parameters()).device)
            maps = collect_features(subject.model, [(imgs, torch.tensor([-1]))], layer)[0][layer]  # (1, H, W, C)
            dead, saturated = dead_channels(maps)[0].tolist(), saturated_channels(maps)[0].tolist()
            for c, channel in enumerate(maps[0].unbind(-1)):
                row = dict(checkpoint=subject.label, layer=layer, image=index, channel=c)
                row |= {name: getattr(channel, name)().item() for name in ("min", "mean", "max", "norm")}
                rows.append(row | dict(dead=dead[c], saturated=saturated[c]))
            squares = maps[0, :, :, :64].permute(2, 0, 1)[:, None]  # (64, 1, H, W)
            low, high = squares.quantile(0.005).item(), squares.quantile(0.995).item()
            mosaic = make_grid(squares, nrow=8, padding=1, pad_value=torch.nan)[0].numpy()
            mappable = axis.imshow(mosaic, cmap="viridis", vmin=low, vmax=high, interpolation="nearest")
            figure.colorbar(mappable, ax=axis, shrink=0.8).set_label("activation", fontsize=12)
            axis.set_title(f"{subject.label}: {layer}", fontsize=13)
    for axis in axes.flat:
        axis.set_axis_off()
    return finish(figure, "the first 64 channels, all on one scale"), rows


def class_selectivity(args: argparse.Namespace, subjects: list[Subject]) -> tuple:
    """Class selectivity index of every block's output channels; histograms of each stage's last (paper App. B)."""
    images, indices = choose_images(args, args.num_images, usual=1000)
    data.check_labels(images)
    (figure, axes), rows, bins = new_figure(1, 4, 13, 3.7), [], np.linspace(0, 1, 21)
    for subject in subjects:
        activity, labels = study(args, subject, images, indices, "block", mean_activity)
        with value_errors_are_the_users():
            index = {name: selectivity(values, labels) for name, values in activity.items()}
        for name, values in index.items():
            row = dict(checkpoint=subject.label, layer=name)
            rows += [row | dict(channel=c, class_selectivity_index=v) for c, v in enumerate(values.tolist())]
        for stage, (axis, name) in enumerate(zip(axes[0], frozen.stage_ends(subject.model)), 1):
            values = index[name][~index[name].isnan()].numpy()
            style = dict(bins=bins, weights=np.full(len(values), 100 / max(len(values), 1)), color=subject.colour)
            axis.hist(values, histtype="step", linewidth=2, label=subject.label, **style)
            axis.axvline(values.mean(), color=subject.colour, linestyle=":", linewidth=2)
            tidy(axis, "class selectivity index", "output channels (%)", f"stage {stage}, last block")
    scale = "0: active for all classes alike, 1: for one class only; dotted: mean"
    return finish(figure, f"{scale} ({len(labels):,} images of {len(labels.unique()):,} classes)"), rows


def grn(args: argparse.Namespace, subjects: list[Subject]) -> tuple:
    """What GRN does, by depth: relative norms N(G(X)), its parameters, and channel norms before and after."""
    for subject in subjects:
        if not isinstance(subject.model.stages[0][0].grn, GRN):
            raise UserError(f"{subject.label} has no GRN, as ConvNeXt V1 has none; give a V2 checkpoint")
    images, indices = choose_images(args, args.num_images, usual=200)
    (figure, axes), rows, levels = new_figure(2, 2, 10, 7.5), [], (5, 25, 50, 75, 95)
    panels = {"N(G(X))": axes[0, 0], "gamma": axes[0, 1], "beta": axes[1, 0], "before": axes[1, 1], "after": axes[1, 1]}
    for subject in subjects:
        norms, _ = study(args, subject, images, indices, ("act", "grn"), channel_norms)
        percentiles = {name: [] for name in panels}  # name -> one row per block
        for block in layer_names(subject.model, "block"):
            layer, before = subject.model.get_submodule(f"{block}.grn"), norms[f"{block}.act"]  # (N, 4C)
            relative = before / (before.mean(dim=1, keepdim=True) + layer.eps)
            for name, values in zip(panels, (relative, layer.gamma, layer.beta, before, norms[f"{block}.grn"])):
                percentiles[name].append(np.percentile(values.detach().cpu().numpy(), levels))
                row = dict(checkpoint=subject.label, block=block, quantity=name)
                rows.append(row | {f"percentile_{level}": v for level, v in zip(levels, percentiles[name][-1])})
        for name, axis in panels.items():
            values, x = np.stack(percentiles[name]), np.linspace(0, 1, len(percentiles[name]))  # (layers, 5)
            note, style = (", after GRN", "--") if name == "after" else ("", "-")
            plot(axis, x, values[:, 2], subject.label + note, subject.colour, style)
            for low, high in ((0, 4), (1, 3)):
                axis.fill_between(x, values[:, low], values[:, high], color=subject.colour, alpha=0.12, linewidth=0)
    titles = ("N(G(X)): norm / mean norm", "gamma", "beta", "channel norm before GRN\n(dashed: after)")
    for axis, title in zip(axes.flat, titles):
        tidy(axis, DEPTH_LABEL, title)
    for axis in (axes[0, 0], axes[1, 1]):
        axis.set_yscale("log")
    return finish(figure, f"median, 25-75% and 5-95% of the channels, over {len(indices):,} images"), rows


def probe(args: argparse.Namespace, subjects: list[Subject]) -> tuple:
    """Accuracy of linear probes on each stage's features and on the last two's, and of 10 nearest neighbours there."""
    if args.data_set == "folder" and not data.split_folder(args.data_path, "val"):
        raise UserError(f"probe compares DIR/val with DIR/train, and {args.data_path} has no val; add one")
    queries = choose_images(args, args.num_images, usual=1000)
    bank = choose_images(args, None, args.bank_images, split="train")
    for images, _ in (bank, queries):
        data.check_labels(images)
    data.check_classes(bank[0].classes, queries[0].classes)
    figure, [[axis]] = new_figure(1, 1, 7, 4.8)
    names, rows, width = [*(f"stage {i}" for i in range(1, 5)), "stages 3, 4", "10 nearest"], [], 0.8 / len(subjects)
    for k, subject in enumerate(subjects):
        ends = frozen.stage_ends(subject.model)
        train, train_labels = study(args, subject, *bank, ends, mean_and_std)
        val, labels = study(args, subject, *queries, ends, mean_and_std)
        values = [100 * frozen.ridge_accuracy(train[end], train_labels, val[end], labels) for end in ends]
        last, last_val = (torch.cat([part[end] for end in ends[2:]], dim=1) for part in (train, val))
        values += frozen.score(last, train_labels, last_val, labels).values()
        places = [i + width * (k + 0.5) - 0.4 for i in range(6)]
        axis.bar(places, values, width, color=subject.colour, label=subject.label)
        print(f"{subject.label}: " + ", ".join(f"{name} {value:.1f}%" for name, value in zip(names, values)))
        rows += [dict(checkpoint=subject.label, features=name, accuracy=value) for name, value in zip(names, values)]
    chance = 100 / len(queries[0].classes)
    axis.axhline(chance, color="grey", linestyle=":")
    tidy(axis, "mean and std over space of the output of", "accuracy (%)")
    axis.set_xticks(range(6), names)
    return finish(figure, f"ridge regression on {len(bank[1]):,} training images; dotted: chance, {chance:.1f}%"), rows


def features(args: argparse.Namespace, subjects: list[Subject]) -> tuple:
    """Features of every image as features.npy, with files.csv; neighbours.png: eight images and their five nearest."""
    (images, indices), columns = choose_images(args, args.num_images, usual=None), {}

    def measure(x):
        return x if x.ndim == 2 else mean_and_std(x)  # (B, D) or (B, H, W, C)

    for subject in subjects:
        ends = frozen.stage_ends(subject.model)
        vectors, _ = study(args, subject, images, indices, [*ends, "norm"], measure)
        if subject is subjects[0]:
            pooled = vectors[ends[args.stage - 1]].chunk(2, dim=1)[0] if args.stage else vectors["norm"]
            np.save(Path(args.output_dir, "features.npy"), pooled.numpy())
            indices = [index for index in indices if not images.unreadable[index]]
            queries = [k * len(indices) // 8 for k in range(8)]
        units = F.normalize(frozen.standardised(torch.cat([vectors[end] for end in ends[2:]], dim=1))[0], dim=1)
        similarity = units[queries] @ units.T  # (8, N)
        similarity[range(8), queries] = 2  # the image itself comes first
        for rank, nearest in enumerate(similarity.topk(min(6, len(units))).indices.T.tolist()):
            title = f"{subject.label}\n{rank}" if rank else "image"
            columns[title] = torch.stack([images[0, indices[k]][0] for k in nearest]) / 255
    names = [images.items[index] if isinstance(images.items[index], str) else index for index in indices]
    classes = [images.classes[int(images.labels[index])] if images.classes else "" for index in indices]
    rows = [{"file": name, "class": label} for name, label in zip(names, classes)]
    caption = "nearest by mean and std over space of the last two stages' outputs"
    short = [name if len(name) < 16 else f"…{name[-15:]}" for name in (Path(str(names[k])).name for k in queries)]
    return draw_panels(columns, caption, short, 1.1), rows


def curves(args: argparse.Namespace) -> tuple:
    """Loss and accuracy of several runs, from their log.jsonl."""
    runs = [run for run in map(Path, args.runs) if (run / "log.jsonl").exists()]
    if not runs:
        fix = "run `python pretrain.py` first, or name run directories"
        raise UserError(f"no log.jsonl in {', '.join(args.runs)}; {fix}")
    if args.label and len(args.label) != len(runs):
        raise UserError(f"{len(args.label)} --label for {len(runs)} runs with a log.jsonl; give one each")
    panels, rows = {}, []
    for run, label, colour in zip(runs, args.label or map(str, runs), cycle(COLOURS)):
        records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        config = json.loads((run / "config.json").read_text())
        for key in dict.fromkeys(key for record in records for key in record):
            points = [(record["epoch"], record[key]) for record in records if record.get(key) is not None]
            if points and (panel := panel_of(key, config)):
                panels.setdefault(panel, {}).setdefault(key, []).append((label, colour, points))
                rows += [dict(run=label, quantity=key, epoch=epoch, value=value) for epoch, value in points]
    if not panels:
        raise UserError(f"no loss or accuracy in {', '.join(map(str, runs))} yet; wait for the log's first lines")
    figure, axes = new_figure(1, len(panels), 5.5 * len(panels) + 0.5, 4.4)
    for axis, (panel, quantities) in zip(axes[0], panels.items()):
        for (key, lines), style in zip(quantities.items(), cycle(("-", "--", ":"))):
            for label, colour, points in lines:
                name = label if len(quantities) == 1 else f"{label}, {key}"
                plot(axis, *zip(*points), name, colour, style)
        tidy(axis, "epochs", panel)
        axis.legend(fontsize=10)
    return finish(figure, ""), rows


def panel_of(key: str, config: dict) -> str | None:
    """Return the label of the y axis on which a log key is drawn; None if it is not drawn."""
    if key.startswith("best_"):  # the highest value so far shows it
        return None
    if key.endswith("loss"):
        kind = "pre-training" if "mask_ratio" in config else "training" if key == "loss" else "validation"
        return f"{kind} loss" + (" (cross-entropy)" if "smoothing" in config else "")  # others have several terms
    if key in ("val_box_AP", "val_mask_AP", "val_mIoU"):
        return "validation AP or mIoU"
    return "validation accuracy (%)" if "top1" in key or key in ("probe", "knn") else None


# --- figures ----------------------------------------------------------------------------------------------------------


def plot(axis, x: Sequence[float], y: Sequence[float], label: str, colour: str, linestyle: str) -> None:
    """Plot a line; if it is solid and its points are few, mark them."""
    marker = "o" if len(x) < 40 and linestyle == "-" else None
    axis.plot(x, y, linestyle, color=colour, label=label, marker=marker, markersize=4, linewidth=2)


def tidy(axis, x_label: str, y_label: str, title: str = "") -> None:
    """Label one panel."""
    axis.set_xlabel(x_label, fontsize=12)
    axis.set_ylabel(y_label, fontsize=12)
    axis.set_title(title, fontsize=12)
    axis.tick_params(labelsize=11)
    axis.grid(alpha=0.3)


def finish(figure, title: str):
    """Add a title and, unless the panels have their own, one legend for all of them; return the figure."""
    figure.suptitle(title, fontsize=13, wrap=True)
    handles = {label: handle for axis in figure.axes for handle, label in zip(*axis.get_legend_handles_labels())}
    if handles and not figure.axes[0].get_legend():
        columns = max(1, int(figure.get_figwidth() * 8 // (max(map(len, handles)) + 6)))
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=columns, fontsize=12)
    return figure


# --- command line -----------------------------------------------------------------------------------------------------

COMMANDS = {"reconstruct": reconstruct, "collapse": collapse, "activations": activations}
COMMANDS |= {"selectivity": class_selectivity, "grn": grn, "curves": curves, "features": features, "probe": probe}


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line, and fill in the first checkpoint's data set and image size."""
    parser = cli.Parser(description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", help=", ".join(COMMANDS))
    parsers = {}
    for name, command in COMMANDS.items():
        summary = command.__doc__.split("\n")[0]
        parsers[name] = commands.add_parser(name, help=summary.replace("%", "%%"), description=summary)
        add_flags(parsers[name], name)
    args = parser.parse_args(argv)
    if args.command == "curves":
        return args
    if args.label and len(args.label) != len(args.checkpoint):
        parser.error(f"{len(args.label)} --label for {len(args.checkpoint)} --checkpoint; give one each")
    order = "checkpoint-best.pth", "newest", "encoder.pth"
    checkpoints = [Path(file_of_run(path, *order)) for path in args.checkpoint]
    if not checkpoints[0].exists():
        raise UserError(f"no checkpoint {checkpoints[0]}; run `python pretrain.py` first, or give --checkpoint PATH")
    config = weights.read_config(checkpoints[0])
    names = ["input_size", "image_max"] + ["data_set", "data_path"] * (not (args.data_set or args.data_path))
    values = {name: config[name] for name in names if config.get(name)}
    if values.get("data_set") not in data.DATA_SETS:  # a name from another project
        values.pop("data_set", None)
    parsers[args.command].take(checkpoints[0], values)
    args = parser.parse_args(argv)
    parsers[args.command].report(args)
    args.checkpoint, args.data_set = checkpoints, cli.choose_data_set(args)
    args.input_size = args.input_size or INPUT_SIZES[args.data_set]
    return args


def add_flags(parser: cli.Parser, command: str) -> None:
    """Add the flags of one command."""
    add, files = parser.add_argument, dict(nargs="+", metavar="PATH")
    add("--output_dir", default="runs/analyze", metavar="DIR", help="where figure and table are written")
    add("--label", nargs="+", metavar="NAME", help="names in the legend, one per checkpoint or run")
    if command == "curves":
        runs = "run directories; those without a log.jsonl are left out (default: runs/pretrain)"
        add("runs", nargs="*", default=["runs/pretrain"], metavar="DIR", help=runs)
        return
    parser.set_defaults(images=None, untrained=False, image_max=None)
    add("--checkpoint", default=["runs/pretrain"], **files, help="weights in any layout, or run directories")
    add("--data_set", choices=data.DATA_SETS, metavar="NAME", help=", ".join(data.DATA_SETS))
    add("--data_path", metavar="DIR", help="folder of images, or where CIFAR lies (default: as in training)")
    add("--input_size", type=cli.number(int, 8, 4096), help="pixels per side of the input (default: as in training)")
    add("--num_images", type=cli.count, help="images to use (default: a few to show, up to 1,000 to measure)")
    add("--batch_size", type=cli.count, default=32, help="images per forward pass; lower it when memory runs out")
    add("--device", help="cuda, cpu or mps (default: cuda if there is one, else cpu)")
    add("--seed", type=cli.number(int, 0), default=0, help="seed of the choice of images, masks and random weights")
    if command in ("reconstruct", "activations", "features"):
        add("--images", **files, help="image files of any size, or folders of them, instead of a data set")
    if command == "reconstruct":
        ratios = dict(type=lambda text: [*map(cli.fraction, text.split(","))], metavar="R[,R...]")
        hide = "fractions of patches to hide, such as 0.3,0.6,0.9; a row per ratio (default: as in training)"
        add("--mask_ratio", "--mask_ratios", **ratios, help=hide)
    else:
        untrained = command == "features"
        add("--untrained", action=cli.BoolFlag, default=untrained, help="add the first network with random weights")
    if command == "activations":
        add("--layer", metavar="NAME", help="such as stages.2.0.grn (default: the third stage's last; .act in V1)")
    if command == "features":
        add("--stage", type=int, choices=range(1, 5), help="this stage, averaged over space (default: pooled)")
    if command == "probe":
        add("--bank_images", type=cli.count, default=4000, help="training images to compare with, at most")


def main(args: argparse.Namespace) -> None:
    """Run the command that `args` (from `get_args`) name, and write its figure and table."""
    directory = Path(args.output_dir)
    directory.mkdir(parents=True, exist_ok=True)
    if args.command == "curves":
        figure, rows = curves(args)
    else:
        device, load = dist.setup(args.device), load_mae if args.command == "reconstruct" else load_network
        figure, rows = COMMANDS[args.command](args, open_subjects(args, device, load))
    plot, table = ("neighbours", "files") if args.command == "features" else (args.command, args.command)
    save_figure(figure, directory / f"{plot}.png")
    save_csv(directory / f"{table}.csv", rows)
    print(f"wrote {plot}.png and {table}.csv into {directory}")


if __name__ == "__main__":
    main(get_args())
