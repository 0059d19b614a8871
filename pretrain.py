"""Pre-train a ConvNeXt encoder as a masked autoencoder (FCMAE, paper Sec. 3 and Tab. 8).

    python pretrain.py                                         # drawn images, minutes on a laptop
    python pretrain.py --data_path DIR                         # any folder of images
    python pretrain.py --data_path DIR --init_weight FILE      # start from published weights, a file or an address
    torchrun --nproc_per_node=8 pretrain.py --data_path DIR    # several GPUs

Flags follow the authors' release. Writes encoder.pth, checkpoints, log.jsonl, config.json and plots to --output_dir.
"""

import argparse
import math
import os
import time
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from torch.distributed.elastic.multiprocessing.errors import record

import data
from data import DATA_SETS, Images, denormalise, load_images, normalise, pretrain_transform
from fast import speed_up
from fcmae import BACKENDS, FCMAE, random_mask
from model import MODELS, check_size
from plumbing import cli, dist, frozen
from plumbing.files import file_of_run, save_tensors, value_errors_are_the_users
from plumbing.loading import mix_seed
from plumbing.optim import parameter_groups
from plumbing.plots import curves_of, draw_curves, new_figure, plot_panels, save_figure
from plumbing.run import Batch, Run
from plumbing.shapes import DRAWN
from sparse import upsample_mask

# Defaults of the small data sets, with a small stem and a short run. Large folders get the paper's recipe (Tab. 8).
DEFAULTS = {
    "cifar10": dict(input_size=32, stem_stride=1, batch_size=256, epochs=200, blr=6e-4),
    "embedded": dict(
        model="convnextv2_yocto", input_size=48, stem_stride=1, decoder_embed_dim=256, batch_size=16, epochs=5,
        eval_freq=5, lr=1e-3,
    ),
}  # fmt: skip
DEFAULTS["cifar100"] = DEFAULTS["cifar10"]
PAPER = dict(epochs=800, blr=1.5e-4)  # Tab. 8
SMALL = 20_000  # a folder with fewer images does not get the paper's schedule


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line, and fill in the data set's defaults."""
    parser = cli.Parser(DEFAULTS, description=__doc__.split("\n\n")[0])
    add = cli.add_model_flags(parser, MODELS)
    start = "weights to start from, a file or an address, in any layout that weights.py reads, or a run's folder"
    add("--init_weight", metavar="PATH", help=start)
    add("--mask_ratio", type=cli.fraction, default=0.6, help="fraction of the patches to hide")
    add("--norm_pix_loss", action=cli.BoolFlag, default=True, help="predict pixels normalised per patch")
    add("--decoder_depth", type=cli.number(int, 0), default=1, help="number of decoder blocks")
    add("--decoder_embed_dim", type=cli.count, default=512, help="width of the decoder")
    add("--backend", choices=BACKENDS, default="sparse", help="how the encoder runs")
    add("--layer_scale_init_value", type=cli.positive, default=1e-6, help="LayerScale's initial value; only V1 has it")
    add("--mlp_norm", metavar="NAME", help="replacement of GRN, a name in experiments/norms.py")
    add("--decoder", metavar="NAME", default="convnext", help="decoder, a name in experiments/decoders.py")
    data_path = "folder of images, or where CIFAR lies; none: the drawn images"
    add = cli.add_data_flags(parser, DATA_SETS, data_path, DRAWN)
    add("--holdout", type=cli.fraction, help="evaluate on this fraction of the training images instead of val/")
    add("--eval_freq", type=cli.count, help="epochs between evaluations (default: a tenth of the epochs)")
    add("--disable_eval", action=cli.BoolFlag, default=False, help="do not evaluate while training")
    add = cli.add_optimisation_flags(parser, epochs=PAPER["epochs"], blr=PAPER["blr"], min_lr=0.0, warmup=40)
    add("--recipe", choices=("paper",), help="the paper's schedule for small data sets too (Tab. 8)")
    cli.add_run_flags(parser, "runs/pretrain")

    args = parser.parse_args(argv)
    parser.refuse_both(args, "init_weight", "resume")
    data_set = cli.choose_data_set(args)
    parser.take(f"the data set {data_set}", DEFAULTS.get(data_set, {}))
    if args.recipe:
        parser.take("recipe paper", PAPER)
    elif data_set == "folder" and 0 < (count := count_images(args.data_path)) < SMALL:
        # Epochs grow from 100 as 1 / sqrt(images); AdamW's learning rate scales as sqrt(batch), from 4096 to 64.
        short = dict(epochs=min(PAPER["epochs"], round(100 * math.sqrt(SMALL / count))), blr=8 * PAPER["blr"])
        parser.take(f"{count:,} images, few for the paper's schedule (--recipe paper)", short)
    start = args.init_weight and file_of_run(args.init_weight, "newest", "encoder.pth", "checkpoint-best.pth")
    if start:
        import weights

        decoder = "decoder", "decoder_depth", "decoder_embed_dim", "norm_pix_loss"
        parser.take(start, weights.flags_of(start, "input_size", "image_max", *decoder))
    args = parser.parse_args(argv)
    args.init_weight = start
    parser.report(args)
    args.data_set = data_set
    cli.derive(args, warmup=40)
    args.eval_freq = args.eval_freq or math.ceil(args.epochs / 10)
    with value_errors_are_the_users():
        check_size(args.input_size, args.input_size, 8 * args.stem_stride)
        grid = args.input_size // (8 * args.stem_stride)
        random_mask(1, grid, grid, args.mask_ratio)  # a ratio that cannot be drawn raises now
    return args


def count_images(directory: str) -> int:
    """Count image files in a folder, or in its train/, by suffix, up to SMALL."""
    folders = os.walk(data.split_folder(directory, "train") or directory, followlinks=True)
    suffixes = (os.path.splitext(name)[1].lower() for _, _, names in folders for name in names)
    return sum(1 for _ in islice((suffix for suffix in suffixes if suffix in data.IMAGE_SUFFIXES), SMALL))


@record  # torchrun then reports the error of the process that failed first
def main(args: argparse.Namespace) -> None:
    """Train the autoencoder that `args` (from `get_args`) describe; write encoder and plots with each checkpoint."""
    device = dist.setup(args.device, args.deterministic)
    with dist.main_process_first():
        transform, more = pretrain_transform(args.input_size), (args.seed, args.embedded_images[0], args.image_max)
        images = load_images(args.data_set, args.data_path, "train", transform, *more)
        if args.holdout:
            images, val = data.split_holdout(images, args.holdout)
        else:
            others = args.data_set != "folder" or data.split_folder(args.data_path, "val")
            val = load_images(args.data_set, args.data_path, "val", None, image_max=args.image_max) if others else None

    torch.manual_seed(args.seed)
    mae = speed_up(make_autoencoder(args))
    if args.init_weight:
        import weights

        for line in weights.load_parts(mae, mae.encoder, args.init_weight, "autoencoder"):
            dist.say(line)
    dist.to_device(mae, device)
    optimizer = torch.optim.AdamW(parameter_groups(mae, args.weight_decay), betas=(0.9, 0.95), fused=True)

    grid = args.input_size // mae.patch_size
    patches = f"{grid} x {grid} patches, {args.mask_ratio:.0%} hidden"
    dist.say(f"{args.model} with decoder: {sum(p.numel() for p in mae.parameters()):,} parameters")
    dist.say(f"{args.data_set}: {len(images):,} images at {args.input_size} px, {patches}")
    samples = data.sample_images(val or images, args.input_size) if dist.rank() == 0 else None
    evaluation = load_evaluation(args, images, val) if dist.rank() == 0 and not args.disable_eval else None
    with Run(args, images, device, mae.train(), optimizer, "pretrain.py") as run:
        if evaluation and not run.records:
            evaluate(run, mae, evaluation, 0)
            run.write("", draw, mae, samples, images.statistics, args.seed, run.records)
        for epoch in run.epochs():
            for batch in run.batches(epoch):
                mask = draw_masks(args, batch, grid)
                with run.autocast:
                    loss, _, _ = run.network(batch.images, mask=mask)
                if run.backward(loss):
                    run.update()

            if evaluation and run.evaluation_due(epoch):
                evaluate(run, mae, evaluation, epoch + 1)
            if run.save_due(epoch):
                encoder = {"model": mae.encoder.state_dict(), "config": run.config}
                run.write("encoder.pth", save_tensors, encoder)
                run.write("", draw, mae, samples, images.statistics, args.seed, run.records)
                run.save(epoch + 1)
    run.finish("encoder.pth (weights for fine-tuning), reconstructions.png, progress.png, log.jsonl, config.json")


def make_autoencoder(args: argparse.Namespace) -> FCMAE:
    """Build the network that the flags describe; UserError where they contradict each other."""
    with value_errors_are_the_users():
        start = dict(layer_scale_init_value=args.layer_scale_init_value)
        encoder = MODELS[args.model](num_classes=0, stem_stride=args.stem_stride, **start)
        encoder.checkpoint_activations(args.checkpoint_activations)
        size = args.mask_ratio, args.decoder_depth, args.decoder_embed_dim, args.norm_pix_loss, args.backend
        if args.mlp_norm:
            from experiments.norms import replace_norm

            replace_norm(encoder, args.mlp_norm)
        if args.decoder != "convnext":
            from experiments.decoders import make_decoder

            return make_decoder(args.decoder, encoder, *size)
        return FCMAE(encoder, *size)


def draw_masks(args: argparse.Namespace, batch: Batch, grid: int) -> torch.Tensor:
    """Draw the batch's masks from (seed, update): the same however the update is divided into batches."""
    generator = torch.Generator().manual_seed(mix_seed("mask", args.seed, batch.update))
    return random_mask(batch.images_in_update, grid, grid, args.mask_ratio, generator)[batch.part]


# --- evaluation -------------------------------------------------------------------------------------------------------


def load_evaluation(args: argparse.Namespace, images: Images, val: Images | None) -> tuple[str, list, list]:
    """Load a seeded choice of images, few enough that all evaluations take less than a tenth of the run's time.

    This assumes that no image costs more than in training: features take a dense forward pass, a loss half of one.
    Returns the loss's name in the log, the images for it (training images if `val` is None), and labelled training
    images (none unless `val` has the same classes), as batches of uint8 images (B, 3, S, S) and labels (B,).
    """
    evaluations = 1 + math.ceil(args.epochs / args.eval_freq)
    labelled = val and images.classes == val.classes is not None
    budget, name = max(24, args.epochs * len(images) // (10 * evaluations)), "val_loss" if val else "train_loss"

    load = partial(data.load_choice, size=args.input_size, workers=args.num_workers)
    queries = load(val or images, min(1000, budget // 3 if labelled else budget))
    bank = load(images, min(4000, budget // 2)) if labelled else []
    sizes = [sum(len(labels) for _, labels in batches) for batches in (queries, bank)]
    more = f"; probe and k-NN from {sizes[1]:,} training images" if bank else ""
    dist.say(f"evaluation: {name} of {sizes[0]:,} images with fixed masks{more}")
    return name, queries, bank


def evaluate(run: Run, mae: FCMAE, evaluation: tuple[str, list, list], epoch: int) -> None:
    """Compute `scores`, and log them beside the untrained ones. Only the main process calls it; the others wait."""
    start, results = time.perf_counter(), scores(mae.eval(), run, *evaluation)
    mae.train()
    record = {"epoch": epoch, "update": run.done} | results
    record["eval_seconds"] = round(time.perf_counter() - start, 2)
    both = [*run.records[:1], record]
    words = [f"{key} " + " -> ".join(f"{r[key]:.4g}" for r in both if key in r) for key in results]
    run.record(record, f"epoch {epoch}/{run.last_epoch + 1}  {'  '.join(words)}")


@torch.no_grad()
def scores(mae: FCMAE, run: Run, loss: str, queries: list, bank: list) -> dict[str, float]:
    """Measure the loss with fixed masks and, where there are labels, accuracies of frozen features in percent."""

    def normalised(batches: list) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return ((normalise(pixels, run.images.statistics, run.device), labels) for pixels, labels in batches)

    generator, losses = torch.Generator().manual_seed(mix_seed("evaluation")), []
    for imgs, _ in normalised(queries):
        with run.autocast:
            losses += [mae(imgs, generator=generator)[0].item()] * len(imgs)
    results = {loss: round(sum(losses) / len(losses), 6)}
    if bank:
        ends, parts = frozen.stage_ends(mae.encoder)[2:], []
        for batches in (bank, queries):
            features, labels = frozen.collect_features(mae.encoder, normalised(batches), ends, frozen.mean_and_std)
            parts += [torch.cat([*features.values()], dim=1), labels]  # (N, D) of the last two stages
        results |= frozen.score(*parts)
    return results


# --- plots ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def reconstruction_panels(mae: FCMAE, imgs: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Reconstruct images (N, C, H, W): originals, visible patches, predicted patches, and both together."""
    _, pred, mask = mae(imgs, generator=generator)
    prediction = mae.reconstruct(imgs, pred)
    hidden = upsample_mask(mask, mae.patch_size)[:, None]  # (N, 1, H, W)
    return {
        "original": imgs,
        "visible": imgs.masked_fill(hidden, 0),
        "prediction": prediction.masked_fill(~hidden, 0),
        "pasted": torch.where(hidden, prediction, imgs),
    }


def draw(directory: Path, mae: FCMAE, pixels: torch.Tensor, statistics: tuple, seed: int, records: list[dict]) -> None:
    """Write reconstructions.png of uint8 `pixels` (N, 3, S, S), and progress.png from the log's records."""
    imgs = normalise(pixels, statistics, mae.mask_token.device)
    panels = reconstruction_panels(mae.eval(), imgs, torch.Generator().manual_seed(seed))
    mae.train()
    normalised = "; mean brightness and contrast of each hidden patch are given" if mae.norm_pix_loss else ""
    caption = f"{mae.mask_ratio:.0%} of the patches hidden{normalised}"
    images = {title: denormalise(panel, statistics) for title, panel in panels.items()}
    plot_panels(directory / "reconstructions.png", images, caption)
    losses = {"training": "loss", "training images, fixed masks": "train_loss", "held-out images": "val_loss"}
    accuracies = {"linear probe": "probe", "10 nearest neighbours": "knn"} if "probe" in records[0] else {}
    figure, axes = new_figure(1, 1 + bool(accuracies), 6 + 6 * bool(accuracies), 3.6)
    titles = ("Pre-training loss", "mean squared error"), ("Accuracy of frozen features on held-out images", "%")
    for axis, keys, (title, y_label) in zip(axes[0], (losses, accuracies), titles):
        draw_curves(axis, curves_of(records, keys), "epoch; 0: untrained", y_label, title)
    save_figure(figure, directory / "progress.png")


if __name__ == "__main__":
    main(get_args())
