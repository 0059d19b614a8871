"""See what a network learned: the paper's figures and numbers from checkpoints.

    python analyze.py reconstruct                                      # after `python pretrain.py`
    python analyze.py collapse --checkpoint runs/v2 runs/v1 --label V2 V1
    python analyze.py curves runs/*

Each command writes a picture and, as CSV, the numbers behind it to --output_dir. Features are those of the dense network on
whole, unmasked images. In a notebook, use the functions of the first three sections.

Shapes: N images, H x W sites, L = H * W, C channels, K classes, D feature dimensions.
"""

import plumbing  # isort: skip (first: Ctrl-C then ends the imports below, which take seconds, without a traceback)
import argparse
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, product
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torchvision.utils import make_grid
from tqdm import tqdm

import data
from ablations.decoders import DECODERS
from data import Images, center_transform, denormalise, load_images, normalise
from fcmae import FCMAE, reconstruction_panels
from model import GRN, Block, ConvNeXt, check_size
from plumbing import flags, layouts
from plumbing.files import file_of_run, prepare_output_dir, save_csv
from plumbing.loading import Unreadable, divided, make_loader
from plumbing.log import read_log, shows_bars
from plumbing.plots import COLOURS, new_figure, plot_panels, save_figure
from plumbing.processes import setup_processes
from plumbing.script import UserError, counted, run_script, value_errors_are_the_users
from plumbing.seeds import mix_seed

INPUT_SIZES = {"embedded": 48, "folder": 224, "cifar10": 32, "cifar100": 32}  # where a checkpoint does not say
DEPTH_LABEL = "normalised layer index\n(0 first block, 1 last block)"


# --- measures ---------------------------------------------------------------------------------------------------------


def cosine_distance(features: torch.Tensor) -> torch.Tensor:
    """Feature cosine distance of each image (paper Sec. 4): (N, H, W, C) or (N, L, C) -> (N,), NaN below two live channels.

    The mean of (1 - cos(X_i, X_j)) / 2 over ordered pairs i != j of live channels, each map flattened to a vector: 0 when all
    channels are alike, 1 for a pair of opposite ones, 0.5 when they are orthogonal. Dead channels, of norm zero, have no
    direction and are left out; `dead_channels` counts them. The paper averages over all C^2 pairs, i = j included, which is
    (C - 1) / C of this.

    The sum of all cosines is the squared length of the sum of the unit vectors, so no C x C matrix is formed.
    """
    maps = _flat(features)  # (N, H, W, C) -> (N, L, C)
    norms = torch.linalg.vector_norm(maps, dim=1, keepdim=True)  # (N, 1, C)
    units = torch.where(norms == 0, 0, maps / norms)
    live = (norms != 0).sum(dim=(1, 2))  # (N,)
    cosines = units.sum(dim=2).square().sum(dim=1) - live  # (N, L) -> (N,): over ordered pairs i != j
    return torch.where(live < 2, torch.nan, (1 - cosines / (live * (live - 1))) / 2)


def dead_channels(features: torch.Tensor, threshold: float = 0.01) -> torch.Tensor:
    """(N, H, W, C) -> (N, C) boolean: channels whose norm is at most `threshold` of the image's mean channel norm.

    Relative, because the scale of a layer is arbitrary; a channel that is zero throughout is always dead.
    """
    norms = channel_norms(features)
    return norms <= threshold * norms.mean(dim=1, keepdim=True)


def saturated_channels(features: torch.Tensor, threshold: float = 0.1) -> torch.Tensor:
    """(N, H, W, C) -> (N, C) boolean: channels stuck at one value, not dead, that say nothing about where things are.

    Their standard deviation over space is at most `threshold` of their mean's magnitude, whatever its sign: GELU is flat near
    its minimum of -0.17 too. Meaningless on a map of a single site.
    """
    std, mean = torch.std_mean(_flat(features), dim=1, correction=0)  # (N, L, C) -> (N, C)
    return (std <= threshold * mean.abs()) & ~dead_channels(features)


def channel_norms(features: torch.Tensor) -> torch.Tensor:
    """(N, H, W, C) -> (N, C): each channel's L2 norm over space, G(X) of GRN (paper Alg. 1)."""
    return torch.linalg.vector_norm(_flat(features), dim=1)


def mean_activity(features: torch.Tensor) -> torch.Tensor:
    """(N, H, W, C) -> (N, C): the mean over space of the positive part, never negative, as `selectivity` needs."""
    return _flat(features).relu().mean(dim=1)


def selectivity(activity: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Class selectivity index of each channel: activity (N, C), not negative, and labels (N,) -> (C,).

    (mu_max - mu_rest) / (mu_max + mu_rest): mu_max is the highest class mean of the activity, mu_rest the mean over the other
    classes. 1 for a channel that answers to one class only, 0 for one that answers to all alike, NaN for one that is silent.
    Raises ValueError for fewer than two classes.
    """
    classes = labels.unique()
    if len(classes) < 2:
        raise ValueError(f"{len(classes)} class among the images; selectivity compares at least two")
    means = torch.stack([activity[labels == k].mean(dim=0) for k in classes])  # (K, C)
    highest = means.amax(dim=0)
    rest = (means.sum(dim=0) - highest) / (len(classes) - 1)
    return (highest - rest) / (highest + rest)  # 0 / 0 is NaN: silent for every class


def knn_accuracy(bank: torch.Tensor, bank_labels: torch.Tensor, queries: torch.Tensor, labels: torch.Tensor, k: int = 10) -> float:
    """Share of `queries` (N, D) whose class (N,) wins the vote of the `k` nearest of `bank` (M, D), with labels (M,).

    Nearest by cosine similarity s; a vote weighs exp(s / 0.07), as is usual for frozen features (Wu et al. 2018).
    """
    bank, right = nn.functional.normalize(bank, dim=1), 0
    one_hot = nn.functional.one_hot(bank_labels).to(bank.dtype)  # (M, K)
    for some, truth in zip(queries.split(512), labels.split(512)):
        similarity, nearest = (nn.functional.normalize(some, dim=1) @ bank.T).topk(min(k, len(bank)), dim=1)  # (n, k)
        votes = ((similarity / 0.07).exp()[..., None] * one_hot[nearest]).sum(dim=1)  # (n, k, K) -> (n, K)
        right += (votes.argmax(dim=1) == truth).sum().item()
    return right / len(queries)


def ridge_accuracy(
    known: torch.Tensor, known_labels: torch.Tensor, found: torch.Tensor, labels: torch.Tensor, strength: float = 0.01
) -> float:
    """Share of `found` (N, D) whose class (N,) a linear layer gets right that is fitted to `known` (M, D), with labels (M,).

    Ridge regression on one-hot classes in closed form, `strength` x M on the diagonal of the features' products, each feature of
    variance one: nothing is tuned, and nothing random.
    """
    std, mean = torch.std_mean(known.double(), dim=0, correction=0)
    known, found = ((part.double() - mean) / torch.where(std == 0, 1, std) for part in (known, found))
    targets = nn.functional.one_hot(known_labels).double()  # (M, K)
    products = known.T @ known + strength * len(known) * torch.eye(known.shape[1], dtype=torch.float64)  # (D, D)
    weight = torch.linalg.solve(products, known.T @ (targets - targets.mean(dim=0)))  # (D, K)
    return ((found @ weight + targets.mean(dim=0)).argmax(dim=1) == labels).double().mean().item()


def effective_rank(features: torch.Tensor) -> torch.Tensor:
    """(N, H, W, C) -> (N,): how many dimensions the channels of each image fill, from 1 to the smaller of H x W and C.

    The exponential of the entropy of the singular values, taken as shares of their sum (Roy and Vetterli 2007).
    """
    maps = _flat(features)  # (N, H, W, C) -> (N, L, C)
    short = maps if maps.shape[1] < maps.shape[2] else maps.mT  # its square has the fewer eigenvalues
    values = torch.linalg.eigvalsh(short @ short.mT).clamp(min=0).sqrt()  # (N, min(L, C))
    shares = values / values.sum(dim=1, keepdim=True)
    return torch.special.entr(shares).sum(dim=1).exp()


def pca(features: torch.Tensor, components: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Principal components: (N, D) -> scores (N, components) and each component's share of the variance (components,).

    Signs are fixed, so that equal features give equal pictures: the largest loading of each component is positive.
    """
    centred = features.double() - features.double().mean(dim=0)
    variances, axes = torch.linalg.eigh(centred.T @ centred)  # ascending: (D,), (D, D)
    axes = axes.flip(1)[:, :components]
    axes = axes * axes.gather(0, axes.abs().argmax(dim=0, keepdim=True)).sign()
    return (centred @ axes).to(features.dtype), (variances.flip(0)[:components] / variances.sum()).to(features.dtype)


def _flat(features):
    wide = torch.promote_types(features.dtype, torch.float32)  # sums of squares overflow float16
    return features.flatten(1, -2).to(wide)  # (N, H, W, C) -> (N, L, C)


# --- networks ---------------------------------------------------------------------------------------------------------


def load_network(path: str | Path, device: torch.device | str = "cpu") -> ConvNeXt:
    """The encoder or classifier of any checkpoint that weights.py reads, in eval mode; UserError for anything else.

    Depths, widths, version, stem and classes are those of the tensors.
    """
    return layouts.build(layouts.to_native(layouts.read_file(path))).to(device).eval()


def load_mae(path: str | Path, device: torch.device | str = "cpu") -> FCMAE:
    """The autoencoder of a pre-training checkpoint, in eval mode; UserError when it holds no decoder."""
    state, config = layouts.read_file(path), layouts.read_config(path)
    if "mask_token" not in state:
        raise UserError(f"{path} holds no decoder, which reconstructing needs; give a checkpoint-<epoch>.pth of pretrain.py")
    mae = DECODERS[config.get("decoder", "convnext")](
        load_network(path),
        mask_ratio=config.get("mask_ratio", 0.6),
        decoder_depth=config.get("decoder_depth", len({name.split(".")[1] for name in state if name.startswith("decoder.")})),
        decoder_embed_dim=state["mask_token"].shape[1],
        norm_pix_loss=config.get("norm_pix_loss", True),
        backend="leaky" if config.get("backend") == "leaky" else "sparse",  # the others compute the same, slower
    )
    decoder = {name: tensor for name, tensor in state.items() if name.split(".")[0] in ("proj", "mask_token", "decoder", "pred")}
    try:
        mae.load_state_dict(decoder | {f"encoder.{name}": tensor for name, tensor in mae.encoder.state_dict().items()})
    except RuntimeError as error:
        raise UserError(f"{path} holds a decoder that does not fit its encoder: {error}") from None
    return mae.to(device).eval()


def find_checkpoint(path: str) -> Path:
    """A file as it is; of a run directory the best, else the newest checkpoint, else encoder.pth."""
    file = file_of_run(path, "checkpoint-best.pth", "newest", "encoder.pth")
    if not os.path.exists(file):  # unlike Path's, never raises
        raise UserError(f"no checkpoint {file}; run `python pretrain.py` first, or name a file or run directory with --checkpoint")
    return Path(file)


# --- features ---------------------------------------------------------------------------------------------------------


class Batches:
    """Normalised images (B, 3, S, S) on `device` and their labels (B,), -1 without; may be iterated again and again."""

    def __init__(self, images: Images, indices: list[int], statistics: tuple, batch_size: int, device: torch.device):
        self.images, self.statistics, self.device = images, statistics, device
        self.loader = make_loader(images, divided(indices, batch_size))

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        unreadable = Unreadable(self.images)
        for pixels, labels, failed in self.loader:
            unreadable.note(failed)
            yield normalise(pixels, self.statistics, self.device), labels


def layer_names(model: ConvNeXt, where: str) -> list[str]:
    """The layers that `where` stands for: a kind, "act", "grn" or "block", stands for those of all blocks, first to last.

    "act" is after GELU and "grn" after GRN, both 4C wide (in V1, where nothing follows GELU, they are the same); "block" is the
    output of the whole block, C wide; "norm" is the pooled and, with a head, normalised feature vector. "stages.2.1",
    "stages.2.1.act" and "stages.2.1.grn" are single layers. UserError for any other name.
    """
    blocks = [f"stages.{i}.{j}" for i, depth in enumerate(model.depths) for j in range(depth)]
    kinds = {"act": [f"{block}.act" for block in blocks], "grn": [f"{block}.grn" for block in blocks], "block": blocks}
    names = {"norm", *blocks, *kinds["act"], *kinds["grn"]}
    if where not in kinds and where not in names:
        raise UserError(f"no layer {where!r}; choose norm, or one of {', '.join(blocks)}, alone or followed by .act or .grn")
    return kinds.get(where, [where])


@torch.no_grad()
def collect_features(
    model: ConvNeXt,
    loader: Iterable,
    where: str | Sequence[str],
    measure: Callable[[torch.Tensor], torch.Tensor] | None = None,
    title: str = "images",
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Run `model` over `loader` and keep `measure` of every layer's features, on the CPU.

    loader: batches of (images (B, 3, S, S), labels (B,)), for example `Batches`.
    where: one or several names that `layer_names` knows.
    measure: (B, H, W, C) -> (B, ...), or (B, D) -> (B, ...) for "norm". It runs as soon as a layer is computed, so only one
        batch's features exist at a time. None keeps the features themselves: for few images.
    Returns {layer: (N, ...)} in the network's order, and the labels (N,).
    """
    names = [name for part in ([where] if isinstance(where, str) else where) for name in layer_names(model, part)]
    kept, labels = {name: [] for name in names}, []

    def keep_as(name):
        def hook(module, inputs, output):
            features = output.permute(0, 2, 3, 1) if isinstance(module, Block) else output  # (B, C, H, W) -> (B, H, W, C)
            kept[name].append((measure(features) if measure else features).cpu())

        return hook

    handles = [model.get_submodule(name).register_forward_hook(keep_as(name)) for name in names]
    try:
        for imgs, some_labels in tqdm(loader, title, unit="batch", disable=not shows_bars()):
            model.forward_features(imgs)
            labels.append(some_labels)
    finally:
        for handle in handles:
            handle.remove()
    return {name: torch.cat(parts) for name, parts in kept.items()}, torch.cat(labels)


# --- commands ---------------------------------------------------------------------------------------------------------


@dataclass
class Subject:
    """A network under study: its name and colour in figures, and the statistics that its images were normalised with."""

    label: str
    colour: str
    statistics: tuple
    model: ConvNeXt | FCMAE


def open_subjects(args: argparse.Namespace, load: Callable = load_network) -> list[Subject]:
    """The networks of --checkpoint and --untrained. Data and image size that `args` leave open become those of the first."""
    paths = [find_checkpoint(path) for path in args.checkpoint]
    configs = [layouts.read_config(path) for path in paths]
    if args.data_set is None:
        trained = {} if args.data_path else configs[0]
        args.data_path = args.data_path or trained.get("data_path")
        name = trained.get("data_set")
        args.data_set = data.choose_data_set(name if name in data.DATA_SETS else None, args.data_path)
    args.input_size = args.input_size or configs[0].get("input_size") or INPUT_SIZES[args.data_set]

    names = [path.parent.name if path.stem.startswith(("checkpoint-", "encoder")) else path.stem for path in paths]
    labels = args.label or (names if len(set(names)) == len(names) else [str(path) for path in paths])
    models = [load(path, args.device) for path in paths]
    if args.untrained:
        torch.manual_seed(args.seed)
        start = {name: value for name, value in configs[0].items() if name == "layer_scale_init_value"}
        fresh = layouts.build(models[0].state_dict(), load=False, **start)
        labels, configs, models = [*labels, "untrained"], [*configs, configs[0]], [*models, fresh.to(args.device).eval()]
    for label, model in zip(labels, models):
        if model.in_chans != 3:
            raise UserError(f"{label} takes images of {model.in_chans} channels, and the data sets here have 3")
        with value_errors_are_the_users():
            check_size(args.input_size, args.input_size, model.patch_size)
    statistics = [data.STATISTICS.get(config.get("data_set"), data.STATISTICS[args.data_set]) for config in configs]
    return [Subject(*parts) for parts in zip(labels, cycle(COLOURS), statistics, models)]


def choose_images(args: argparse.Namespace, usual: int, split: str = "val") -> tuple[Images, list[int]]:
    """The images of --images or of the data set, and a seeded choice of indices: --num_images, or `usual` if there are."""
    transform = center_transform(args.input_size)
    if args.images:
        images, source = Images([open_image(path) for path in args.images], None, None, transform, None), "--images"
    else:
        if args.data_set == "folder" and not data.split_folder(args.data_path, "val"):
            split = "train"
        drawn = max(args.num_images or 0, data.DRAWN[data.SPLITS.index(split)])
        images = load_images(args.data_set, args.data_path, split, transform, count=drawn)
        source = f"{args.data_set} ({split})"
    count = args.num_images or (len(images) if args.images else min(usual, len(images)))
    if count > len(images):
        raise UserError(f"--num_images {count}, but {source} has {counted(len(images), 'image')}; ask for at most that many")
    if args.command in ("selectivity", "embed", "probe") and images.labels is None:
        raise UserError(f"{args.command} needs labels, and {args.data_path} has none; arrange it as DIR/val/<class>/<image>")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(mix_seed("images", args.seed)))
    print(f"{count} of {counted(len(images), 'image')} of {source} at {args.input_size} px, on {args.device}")
    return images, sorted(order[:count].tolist())


def open_image(path: str) -> np.ndarray:
    """An image file as uint8 (H, W, 3)."""
    try:
        return np.asarray(data.open_rgb(path))
    except Exception:  # damaged files raise nearly anything
        raise UserError(
            f"cannot read the image {path} ({data.why_unreadable(path)}); give a picture such as a .jpg or .png"
        ) from None


def study(args: argparse.Namespace, subject: Subject, images: Images, indices: list[int], where, measure=None):
    """`collect_features` of one subject on chosen images."""
    loader = Batches(images, indices, subject.statistics, args.batch_size, args.device)
    return collect_features(subject.model, loader, where, measure, subject.label)


def reconstruct(args: argparse.Namespace) -> None:
    """Original, visible patches, prediction, and both together (paper Fig. 2)."""
    subjects = open_subjects(args, load_mae)
    images, indices = choose_images(args, usual=4)
    columns, rows, table = {}, [], []
    for index, ratio, subject in product(indices, args.mask_ratio or [None], subjects):
        mae = subject.model
        mae.mask_ratio = ratio or mae.mask_ratio
        imgs = normalise(images[0, index][0][None], subject.statistics, args.device)  # (1, 3, S, S)
        seed = mix_seed("mask", args.seed, index)  # the same for every ratio: what a lower one hides, a higher one hides too
        with value_errors_are_the_users():
            panels = reconstruction_panels(mae, imgs, torch.Generator().manual_seed(seed))
        for title, panel in panels.items():
            columns.setdefault(title, []).append(denormalise(panel, subject.statistics))
        with torch.no_grad():
            loss, _, mask = mae(imgs, generator=torch.Generator().manual_seed(seed))
        rows.append((f"{subject.label}\n" if len(subjects) > 1 else "") + f"{mae.mask_ratio:.0%} hidden")
        table.append([subject.label, index, mae.mask_ratio, mask.sum().item(), mask.numel(), loss.item()])
    given = any(subject.model.norm_pix_loss for subject in subjects)
    caption = "each patch's true mean and contrast are given,\nits structure is predicted (trained on normalised pixels)"
    path = Path(args.output_dir) / "reconstruct.png"
    plot_panels(path, {title: torch.cat(parts) for title, parts in columns.items()}, caption if given else "", rows)
    write_table(args, ["checkpoint", "image", "mask_ratio", "hidden_patches", "patches", "loss"], table)


def collapse(args: argparse.Namespace) -> None:
    """Feature cosine distance, dead and saturated channels, effective rank of the 4C-wide features against depth (paper Sec. 4, Fig. 4)."""
    subjects = open_subjects(args)
    images, indices = choose_images(args, usual=1000)

    def measure(features):
        shares = [100 * kind(features).float().mean(dim=1) for kind in (dead_channels, saturated_channels)]
        return torch.stack([cosine_distance(features), *shares, effective_rank(features)], dim=1)  # (N, 4)

    figure, axes = new_figure(1, 4, 17, 4.8)
    table = []
    for subject in subjects:
        kinds = {"act": "after GELU", "grn": "after GRN"} if subject.model.version == 2 else {"act": "after GELU"}
        found, _ = study(args, subject, images, indices, list(kinds), measure)
        for kind, tensor in kinds.items():
            names = layer_names(subject.model, kind)
            values, x = np.stack([found[name].numpy() for name in names]), normalised_index(len(names))  # (layers, N, 4)
            mean, std = np.nanmean(values, axis=1), np.nanstd(values, axis=1)  # (layers, 4)
            dashed = "--" if kind == "act" and len(kinds) == 2 else "-"
            for k, axis in enumerate(axes[0]):
                plot(axis, x, mean[:, k], f"{subject.label}, {tensor}", subject.colour, dashed)
                low, high = mean[:, k] - std[:, k], mean[:, k] + std[:, k]
                axis.fill_between(x, low.clip(min=0), high, color=subject.colour, alpha=0.12, linewidth=0)
            table += [[subject.label, name, tensor, x[i], *mean[i], *std[i]] for i, name in enumerate(names)]
    titles = ("feature cosine distance", "dead channels", "saturated channels", "effective rank")
    scales = (
        "0: all channels alike, 0.5: orthogonal",
        "% (norm below 1% of the mean)",
        "% (std below 10% of the mean)",
        "dimensions",
    )
    for axis, title, scale in zip(axes[0], titles, scales):
        tidy(axis, DEPTH_LABEL, scale, title)
        axis.set_ylim(bottom=min(axis.get_ylim()[0], 0.4) if axis is axes[0, 0] else 0)
    finish(args, figure, f"mean and standard deviation over {counted(len(indices), 'image')}")
    quantities = ("cosine_distance", "dead_percent", "saturated_percent", "effective_rank")
    names = [f"{quantity}_{kind}" for kind in ("mean", "std") for quantity in quantities]
    write_table(args, ["checkpoint", "layer", "tensor", "normalised_index", *names], table)


def activations(args: argparse.Namespace) -> None:
    """64 channel maps of one layer as small squares, checkpoints side by side on the same image (paper Fig. 3)."""
    subjects = open_subjects(args)
    images, indices = choose_images(args, usual=1)
    figure, axes = new_figure(len(indices), 1 + len(subjects), 4.6 * len(subjects) + 3.5, 0.4 + 4.1 * len(indices))
    table = []
    for row, subject in product(range(len(indices)), subjects):
        axis, index = axes[row, 1 + subjects.index(subject)], indices[row]
        layer = args.layer or f"stages.2.{subject.model.depths[2] - 1}.grn"
        if layer == "norm" or layer_names(subject.model, layer) != [layer]:
            raise UserError(f"--layer {layer} is not a single layer with maps; give one such as stages.2.0.grn")
        maps = study(args, subject, images, [index], layer)[0][layer]  # (1, H, W, C)
        dead, saturated = dead_channels(maps)[0].tolist(), saturated_channels(maps)[0].tolist()
        for c, channel in enumerate(maps[0].unbind(-1)):
            values = (channel.min(), channel.mean(), channel.max(), channel.norm())
            table.append([subject.label, layer, index, c, *(value.item() for value in values), dead[c], saturated[c]])
        shown = maps[0, :, :, :64].permute(2, 0, 1)[:, None]  # (64, 1, H, W)
        low, high = shown.quantile(0.005).item(), shown.quantile(0.995).item()
        mosaic = make_grid(shown, nrow=8, padding=1, pad_value=torch.nan)[0].numpy()
        picture = axis.imshow(mosaic, cmap="viridis", vmin=low, vmax=high, interpolation="nearest")
        figure.colorbar(picture, ax=axis, shrink=0.8).set_label("activation", fontsize=12)
        after = layer.replace(".grn", " after " + ("GRN" if subject.model.version == 2 else "GELU")).replace(".act", " after GELU")
        axis.set_title(f"{subject.label}: {after}", fontsize=13)
        axes[row, 0].imshow(images[0, index][0].permute(1, 2, 0).numpy())
        axes[row, 0].set_title("image", fontsize=13)
    for axis in axes.flat:
        axis.set_axis_off()
    finish(args, figure, "the first 64 channels, all on one scale")
    write_table(args, ["checkpoint", "layer", "image", "channel", "min", "mean", "max", "norm", "dead", "saturated"], table)


def class_selectivity(args: argparse.Namespace) -> None:
    """Class selectivity index of every block's output channels, as histograms (paper App. B)."""
    subjects = open_subjects(args)
    images, indices = choose_images(args, usual=1000)
    depth = max(sum(subject.model.depths) for subject in subjects)
    panels = min(12, depth)  # deeper networks show 12 blocks, evenly spaced; the table has them all
    figure, axes = new_figure(-(-panels // 4), 4, 13, 1.4 + 2.3 * -(-panels // 4))
    table, bins = [], np.linspace(0, 1, 21)
    for subject in subjects:
        activity, labels = study(args, subject, images, indices, "block", mean_activity)
        try:
            index = {name: selectivity(values, labels) for name, values in activity.items()}
        except ValueError as error:
            raise UserError(f"{error}; give a data set with more classes, or more --num_images") from None
        table += [[subject.label, name, c, value] for name, values in index.items() for c, value in enumerate(values.tolist())]
        names = list(index)
        for axis, place in zip(axes.flat, normalised_index(panels)):
            name = names[round(place * (len(names) - 1))]
            values = index[name][~index[name].isnan()].numpy()
            style = dict(bins=bins, weights=np.full(len(values), 100 / max(len(values), 1)), color=subject.colour)
            axis.hist(values, histtype="stepfilled", alpha=0.2, **style)
            axis.hist(values, histtype="step", linewidth=2, label=subject.label, **style)
            axis.axvline(values.mean(), color=subject.colour, linestyle=":", linewidth=2)
            tidy(axis, "", "", name if subject is subjects[0] else axis.get_title())
    for axis in axes.flat[panels:]:
        axis.set_axis_off()
    for axis in axes[-1]:
        axis.set_xlabel("class selectivity index", fontsize=12)
    figure.supylabel("share of the block's output channels (%)", fontsize=13)
    scale = "0: active for all classes alike, 1: for one class only; dotted: mean"
    finish(args, figure, f"{scale} ({counted(len(indices), 'image')} of {counted(len(labels.unique()), 'class')})")
    write_table(args, ["checkpoint", "layer", "channel", "class_selectivity_index"], table)


def grn(args: argparse.Namespace) -> None:
    """What GRN does, against depth: relative norms N(G(X)), its parameters, and channel norms before and after."""
    subjects = open_subjects(args)
    for subject in subjects:
        if not isinstance(subject.model.stages[0][0].grn, GRN):
            raise UserError(f"{subject.label} has no GRN, as ConvNeXt V1 has none; give a V2 checkpoint")
    images, indices = choose_images(args, usual=200)
    figure, axes = new_figure(2, 2, 10, 7.5)
    panels = {"N(G(X))": axes[0, 0], "gamma": axes[0, 1], "beta": axes[1, 0], "before": axes[1, 1], "after": axes[1, 1]}
    table, levels = [], (5, 25, 50, 75, 95)
    for subject in subjects:
        norms, _ = study(args, subject, images, indices, ("act", "grn"), channel_norms)
        found = {name: [] for name in panels}
        for block in layer_names(subject.model, "block"):
            before, layer = norms[f"{block}.act"], subject.model.get_submodule(f"{block}.grn")  # (N, 4C)
            relative = before / (before.mean(dim=1, keepdim=True) + layer.eps)
            for name, values in zip(panels, (relative, layer.gamma, layer.beta, before, norms[f"{block}.grn"])):
                found[name].append(np.percentile(values.detach().cpu().numpy(), levels))
                table.append([subject.label, block, name, *found[name][-1]])
        for name, axis in panels.items():
            points, x = np.stack(found[name]), normalised_index(len(found[name]))  # (layers, 5)
            note, style = (", after GRN", "--") if name == "after" else ("", "-")
            plot(axis, x, points[:, 2], subject.label + note, subject.colour, style)
            for low, high in ((0, 4), (1, 3)):
                axis.fill_between(x, points[:, low], points[:, high], color=subject.colour, alpha=0.12, linewidth=0)
    for axis, label in zip(axes.flat, ("N(G(X)): norm / mean norm", "gamma", "beta", "channel norm before GRN\n(dashed: after)")):
        tidy(axis, DEPTH_LABEL, label)
    for axis in (axes[0, 0], axes[1, 1]):
        axis.set_yscale("log", subs=(2, 5))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
    finish(args, figure, f"median, 25-75% and 5-95% of the channels, over {counted(len(indices), 'image')}")
    write_table(args, ["checkpoint", "block", "quantity", *(f"percentile_{level}" for level in levels)], table)


def curves(args: argparse.Namespace) -> None:
    """Loss and accuracy of several runs, from their log.jsonl."""
    named = [os.path.dirname(path) or "." if os.path.isfile(path) else path for path in args.runs + args.checkpoint]
    named = named or ["runs/pretrain"]
    runs = [Path(run) for run in named if os.path.exists(f"{run}/log.jsonl")]
    if not runs:
        raise UserError(f"no log.jsonl in {', '.join(named)}; run `python pretrain.py` first, or name run directories")
    if args.label and len(args.label) != len(runs):
        raise UserError(f"{len(args.label)} --label for {len(runs)} runs with a log.jsonl; give one each")
    panels, table = {}, []
    for run, label in zip(runs, args.label or map(str, runs)):
        try:
            records = read_log(run)
            config = json.loads((run / "config.json").read_text()) if (run / "config.json").exists() else {}
        except ValueError as error:
            raise UserError(f"log.jsonl or config.json in {run} is damaged ({error}); mend it, or leave that run out") from None
        if args.x == "images" and "images" not in config:
            raise UserError(f"{run} has no config.json with its number of images; use --x epoch")
        scale = config["images"] if args.x == "images" else 1
        for key in dict.fromkeys(key for record in records for key in record):
            points = [(record["epoch"] * scale, record[key]) for record in records if record.get(key) is not None]
            if points and (panel := panel_of(key, config)):
                panels.setdefault(panel, []).append((label if key == "loss" else f"{label}, {key}", points))
                table += [[label, key, *point] for point in points]
    if not panels:
        raise UserError(f"no loss or accuracy in the log.jsonl of {', '.join(map(str, runs))} yet; wait for the first lines")
    figure, axes = new_figure(1, len(panels), 5.5 * len(panels) + 0.5, 4.4)
    for axis, (panel, lines) in zip(axes[0], panels.items()):
        for k, (name, points) in enumerate(lines):
            plot(axis, *zip(*points), name, COLOURS[k % 8], ("-", "--", ":")[k // 8 % 3])
        tidy(axis, {"epoch": "epochs", "images": "images seen"}[args.x], panel)
        axis.legend(fontsize=10)
    finish(args, figure, "")
    write_table(args, ["run", "quantity", args.x, "value"], table)


def panel_of(key: str, config: dict) -> str | None:
    """The y axis on which a key of the log is drawn; None for the others."""
    if key == "loss":
        return "pre-training loss\n(squared error on hidden patches)" if "mask_ratio" in config else "training loss (cross-entropy)"
    if key.endswith("loss"):
        return "validation loss (cross-entropy)"
    return "validation accuracy (%)" if "top1" in key else None


def embed(args: argparse.Namespace) -> None:
    """Frozen features without training: k-nearest-neighbour accuracy, and a map of the first two principal components."""
    subjects = open_subjects(args)
    bank, (images, indices) = choose_both(args)
    figure, axes = new_figure(1, len(subjects), 4.8 * len(subjects), 5.6)
    table = []
    for subject, axis in zip(subjects, axes[0]):
        (known, known_labels), (found, labels) = (study(args, subject, *part, "norm") for part in (bank, (images, indices)))
        accuracy = 100 * knn_accuracy(known["norm"], known_labels, found["norm"], labels, args.neighbours)
        points, share = pca(nn.functional.normalize(found["norm"], dim=1))  # on the sphere, where the neighbours are sought
        for k, name in enumerate(images.classes[:16]):
            x, y = points[labels == k].T.numpy()
            axis.scatter(x, y, s=18, color=COLOURS[k % 8], marker="o" if k < 8 else "^", linewidth=0, label=name)
        x_label, y_label = (f"{name} principal component ({part:.0%} of variance)" for name, part in zip(("1st", "2nd"), share))
        tidy(axis, x_label, y_label, f"{subject.label}: {accuracy:.1f}% right")
        print(f"{subject.label}: {accuracy:.1f}% of {counted(len(indices), 'image')} right by {args.neighbours} nearest neighbours")
        for i, label, point in zip(indices, labels.tolist(), points.tolist()):
            table.append([subject.label, accuracy, i, images.classes[label], *point])
    chance = 100 / len(images.classes)
    finish(args, figure, f"class by {args.neighbours} nearest of {len(bank[1])} training images; chance {chance:.1f}%")
    write_table(args, ["checkpoint", "knn_accuracy", "image", "class", "pc1", "pc2"], table)


def choose_both(args: argparse.Namespace) -> tuple[tuple[Images, list[int]], tuple[Images, list[int]]]:
    """Training and validation images, of the same classes."""
    if args.data_set == "folder" and not data.split_folder(args.data_path, "val"):
        raise UserError(f"{args.command} compares DIR/val with DIR/train, and {args.data_path} has no val; arrange the folder so")
    queries = choose_images(args, usual=1000)
    bank = choose_images(argparse.Namespace(**vars(args) | {"num_images": None}), usual=args.bank_images, split="train")
    if bank[0].classes != queries[0].classes:
        raise UserError(f"the class folders in {args.data_path}/train and {args.data_path}/val differ; make them the same")
    return bank, queries


def probe(args: argparse.Namespace) -> None:
    """Linear probe of frozen features, without training: ridge regression in closed form on each stage, and on the last two."""
    subjects = open_subjects(args)
    bank, queries = choose_both(args)
    figure, axes = new_figure(1, 1, 7, 4.8)
    axis, table, width = axes[0, 0], [], 0.8 / len(subjects)
    names = ["stage 1", "stage 2", "stage 3", "stage 4", "stages 3, 4"]
    for k, subject in enumerate(subjects):
        ends = [f"stages.{i}.{depth - 1}" for i, depth in enumerate(subject.model.depths)]
        (known, known_labels), (found, labels) = (study(args, subject, *part, ends, mean_and_deviation) for part in (bank, queries))
        parts = [[end] for end in ends] + [ends[2:]]
        joined = [[torch.cat([features[end] for end in part], dim=1) for features in (known, found)] for part in parts]
        values = [100 * ridge_accuracy(x, known_labels, x_val, labels) for x, x_val in joined]
        axis.bar([i + width * (k + 0.5) - 0.4 for i in range(5)], values, width, color=subject.colour, label=subject.label)
        print(f"{subject.label}: " + ", ".join(f"{name} {value:.1f}%" for name, value in zip(names, values)))
        table += [[subject.label, name, value] for name, value in zip(names, values)]
    chance = 100 / len(queries[0].classes)
    axis.axhline(chance, color="grey", linestyle=":")
    tidy(axis, "mean and deviation over space of the output of", "classes right (%)")
    axis.set_xticks(range(5), names)
    finish(args, figure, f"ridge regression on {len(bank[1])} training images; dotted: chance, {chance:.1f}%")
    write_table(args, ["checkpoint", "features", "accuracy"], table)


def mean_and_deviation(features: torch.Tensor) -> torch.Tensor:
    """(N, H, W, C) -> (N, 2 C): over space."""
    std, mean = torch.std_mean(_flat(features), dim=1, correction=0)
    return torch.cat([mean, std], dim=1)


# --- figures, tables, command line ------------------------------------------------------------------------------------


def normalised_index(count: int) -> list[float]:
    """Positions of `count` layers between 0, the first, and 1, the last."""
    return [k / max(count - 1, 1) for k in range(count)]


def plot(axis, x: Sequence[float], y: Sequence[float], label: str, colour: str, linestyle: str) -> None:
    """One line; if solid, its points are marked, unless they are many."""
    marker = "o" if len(x) < 40 and linestyle == "-" else None
    axis.plot(x, y, linestyle, color=colour, label=label, marker=marker, markersize=4, linewidth=2)


def tidy(axis, x_label: str, y_label: str, title: str = "") -> None:
    """Label one panel."""
    axis.set_xlabel(x_label, fontsize=12)
    axis.set_ylabel(y_label, fontsize=12)
    axis.set_title(title, fontsize=12)
    axis.tick_params(labelsize=11)
    axis.grid(alpha=0.3)


def finish(args: argparse.Namespace, figure, title: str) -> None:
    """Write <command>.png with a title and, unless the panels have their own, one legend for all of them."""
    figure.suptitle(title, fontsize=13, wrap=True)
    handles = {label: handle for axis in figure.axes for handle, label in zip(*axis.get_legend_handles_labels())}
    if handles and not figure.axes[0].get_legend():
        fitting = int(figure.get_figwidth() * 8 // (max(map(len, handles)) + 6))
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=max(1, fitting), fontsize=12)
    save_figure(figure, Path(args.output_dir) / f"{args.command}.png")


def write_table(args: argparse.Namespace, header: list[str], rows: list[list]) -> None:
    """Write <command>.csv, and say where picture and numbers are."""
    path = Path(args.output_dir) / args.command
    save_csv(path.with_suffix(".csv"), [dict(zip(header, row)) for row in rows])
    print(f"wrote {path}.png and {path}.csv")


COMMANDS = {"reconstruct": reconstruct, "collapse": collapse, "activations": activations}
COMMANDS |= {"selectivity": class_selectivity, "grn": grn, "curves": curves, "embed": embed, "probe": probe}


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = flags.Parser(description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", help=", ".join(COMMANDS))
    parsers = {}
    for name, command in COMMANDS.items():
        summary = command.__doc__.split("\n")[0]
        parsers[name] = commands.add_parser(name, help=summary, description=summary)
        add_flags(parsers[name], name)
    given = parser.parse_args(argv)
    args = flags.merge(given, parsers[given.command].general)
    if args.command != "curves" and args.label and len(args.label) != len(args.checkpoint):
        parser.error(f"{len(args.label)} --label for {len(args.checkpoint)} --checkpoint; give one each")
    if args.command != "curves" and args.data_set:
        data.choose_data_set(args.data_set, args.data_path)
    return args


def add_flags(parser: flags.Parser, command: str) -> None:
    """The flags of one command. None stands for a default that is found out once checkpoints are open."""
    add, files = parser.adder(), dict(nargs="+", metavar="PATH")
    add("--output_dir", str, "runs/analyze", "where picture and table are written", metavar="DIR")
    add("--label", str, None, "names in the legend, one per checkpoint or run", nargs="+", metavar="NAME")
    if command == "curves":
        help = "run directories; those without a log.jsonl are left out (default: runs/pretrain)"
        parser.add_argument("runs", nargs="*", metavar="DIR", help=help)
        add("--checkpoint", str, [], "more of them, or checkpoints in them", **files)
        add("--x", ("epoch", "images"), "epoch", "align runs by epochs or by images seen")
        return
    add("--checkpoint", str, ["runs/pretrain"], "weights in any layout, or run directories", **files)
    add("--data_set", flags.one_of("data set", data.DATA_SETS), None, ", ".join(data.DATA_SETS))
    add("--data_path", str, None, "folder of images, or where CIFAR lies (default: as in training)", metavar="DIR")
    add("--input_size", flags.image_side, None, "pixels per side of the network's input (default: as in training)")
    add("--num_images", flags.count, None, "images to use (default: a few to show, up to 1,000 to measure)")
    add("--batch_size", flags.count, 32, "images per forward pass; lower it when memory runs out")
    add("--device", str, None, flags.DEVICES)
    add("--seed", flags.seed_number, 0, "of the choice of images, of masks and of random weights")
    if command in ("reconstruct", "activations"):
        add("--images", str, None, "pictures of any size, instead of a data set", **files)
    else:
        parser.general["images"] = None
    if command == "reconstruct":
        help = "shares of patches to hide, such as 0.3,0.6,0.9; a row each (default: as in training)"
        add("--mask_ratio --mask_ratios", ratios, None, help, metavar="R[,R...]")
        parser.general["untrained"] = None
    else:
        add("--untrained", bool, None, "add the first checkpoint's network with random weights")
    if command == "activations":
        add("--layer", str, None, "such as stages.2.0.grn (default: the third stage's last)", metavar="NAME")
    if command == "embed":
        add("--neighbours", flags.count, 10, "neighbours that vote")
    if command in ("embed", "probe"):
        add("--bank_images", flags.count, 4000, "training images to compare with, at most")


def ratios(text: str) -> list[float]:
    """An argparse type: numbers between 0 and 1, separated by commas."""
    return [flags.proper_share(part) for part in text.split(",")]


def main(args: argparse.Namespace) -> None:
    """Run the command that `args` (from `get_args`) name."""
    prepare_output_dir(args.output_dir)
    if args.command != "curves":
        args.device = setup_processes(args.device).device
    COMMANDS[args.command](args)


if __name__ == "__main__":
    run_script(main, get_args)
