"""Pre-train a ConvNeXt encoder as a masked autoencoder (FCMAE, paper Sec. 3 and Tab. 8).

    python pretrain.py                                         # embedded data, minutes on a laptop
    python pretrain.py --data_path DIR                         # any folder of images, the paper's recipe
    torchrun --nproc_per_node=8 pretrain.py --data_path DIR    # several GPUs; docs/clusters.md has several machines

Flags follow the authors' release. Writes encoder.pth, checkpoints, log.jsonl, config.json and pictures to --output_dir.
"""

import plumbing  # isort: skip (first: Ctrl-C then ends the imports below, which take seconds, without a traceback)
import argparse
from pathlib import Path

import torch

from ablations.decoders import DECODERS
from ablations.norms import MLP_NORMS, exchange_norm
from data import (
    DATA_SETS,
    DRAWN,
    center_transform,
    choose_data_set,
    denormalise,
    hold_on_device,
    load_images,
    normalise,
    pretrain_transform,
    split_folder,
)
from fcmae import BACKENDS, FCMAE, random_mask, reconstruction_panels
from model import MODELS, check_size
from plumbing import flags
from plumbing.devices import to_device
from plumbing.files import save_tensors
from plumbing.optim import parameter_groups
from plumbing.plots import plot_curves, plot_panels
from plumbing.processes import Processes, main_process_first
from plumbing.run import Batch, Run, carry_out
from plumbing.script import counted, run_script, value_errors_are_the_users
from plumbing.seeds import mix_seed

# Defaults of the small data sets, with a small stem and a short run. Folders get the paper's recipe (Tab. 8).
DEFAULTS = {
    "cifar10": dict(input_size=32, stem_stride=1, batch_size=256, epochs=200, blr=6e-4),
    "embedded": dict(input_size=48, stem_stride=1, decoder_embed_dim=256, batch_size=32, epochs=3, blr=8e-3),
}
DEFAULTS["cifar100"] = DEFAULTS["cifar10"]


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line, and fill in the defaults of the data set."""
    parser = flags.Parser(DEFAULTS, description=__doc__.split("\n\n")[0])
    add = parser.adder(parser.add_argument_group("model"))
    add("--model", flags.one_of("model", MODELS), "convnextv2_atto", ", ".join(MODELS))
    add("--stem_stride", flags.STRIDES, 4, "stride of the stem; a patch is 8 x this wide")
    flags.add_layer_scale(add)
    add("--mask_ratio", flags.proper_share, 0.6, "share of the patches to hide")
    add("--norm_pix_loss", bool, True, "predict pixels normalised per patch")
    add("--mlp_norm", flags.one_of("norm", MLP_NORMS), None, f"in GRN's place: {', '.join(MLP_NORMS)}")
    add("--decoder", flags.one_of("decoder", DECODERS), "convnext", ", ".join(DECODERS))
    add("--decoder_depth", flags.number(int, 0, 100), 1, "blocks of the decoder; of a U-Net, on each of its grids")
    add("--decoder_embed_dim", flags.number(int, 1, 8192), 512, "width of the decoder")
    add("--backend", flags.one_of("backend", BACKENDS), "sparse", f"how the encoder runs: {', '.join(BACKENDS)}")
    place = "folder of images, or where CIFAR lies; none: the embedded data"
    flags.add_hold_data(flags.add_data_flags(parser, DATA_SETS, place, drawn=DRAWN))
    flags.add_optimisation_flags(parser, epochs=800, blr=1.5e-4, min_lr=0.0, warmup="40, or 5% of short runs")
    flags.add_run_flags(parser, "runs/pretrain")

    given = parser.parse_args(argv)
    data_set = choose_data_set(getattr(given, "data_set", None), getattr(given, "data_path", None))
    args = flags.merge(given, parser.general, **{f"the data set {data_set}": DEFAULTS.get(data_set, {})})
    args.data_set = data_set
    if args.warmup_epochs is None:
        args.warmup_epochs = min(40.0, 0.05 * args.epochs)
    flags.check_run(args, parser)
    flags.check_layer_scale(args, parser)
    with value_errors_are_the_users():
        check_size(args.input_size, args.input_size, 8 * args.stem_stride)
    if args.input_size == 8 * args.stem_stride:
        grid = args.input_size // 8
        fix = f"--stem_stride 1 makes {grid} x {grid} patches of it" if grid > 1 else "try --input_size 32"
        parser.error(f"--input_size {args.input_size} is one patch, and with it hidden nothing is left to predict from; {fix}")
    return args


def main(args: argparse.Namespace) -> None:
    """Pre-train as `args` (from `get_args`) say."""
    carry_out(args, train)


def train(args: argparse.Namespace, processes: Processes, output_dir: Path) -> None:
    """Train the autoencoder, writing its encoder and pictures with the checkpoints of epochs."""
    with main_process_first():
        images = load_images(
            args.data_set, args.data_path, "train", pretrain_transform(args.input_size), args.seed, args.embedded_images[0]
        )
    images = hold_on_device(images, args, processes.device)
    run = Run(args, images, processes, output_dir)

    torch.manual_seed(args.seed)
    mae = make_autoencoder(args)
    to_device(mae, run.device)
    optimizer = torch.optim.AdamW(parameter_groups(mae, args.weight_decay), lr=run.peak_lr, betas=(0.9, 0.95), fused=True)

    grid = args.input_size // mae.patch_size
    for line in flags.describe_origins(args):
        run.say(line)
    run.say(f"{args.model} with decoder: {sum(p.numel() for p in mae.parameters()):,} parameters")
    run.say(
        f"{args.data_set}: {counted(len(images), 'image')} at {args.input_size} px, {grid} x {grid} patches, {args.mask_ratio:.0%} hidden"
    )
    network = run.start(mae.train(), optimizer, "pretrain.py")
    if network is None:
        return
    samples = sample_images(args) if processes.is_main else None
    for epoch in run.epochs():
        for batch in run.batches(epoch):
            mask = draw_masks(args, batch, grid)
            with run.autocast():
                loss, _, _ = network(batch.images, mask=mask)
            if run.backward(loss):
                run.update()

        if run.save_due(epoch):
            run.write("encoder.pth", save_tensors, {"model": mae.encoder.state_dict(), "config": run.config})
            run.write("pictures", draw, mae, samples, images.statistics, args.seed, run.log.records())
            run.save(epoch + 1)
    run.close("encoder.pth (weights for fine-tuning), reconstructions.png, loss.png, log.jsonl, config.json")


def make_autoencoder(args: argparse.Namespace) -> FCMAE:
    """The network that the flags describe; UserError where they contradict each other."""
    with value_errors_are_the_users():
        start = dict(layer_scale_init_value=args.layer_scale_init_value)
        encoder = MODELS[args.model](num_classes=0, stem_stride=args.stem_stride, **start)
        encoder.checkpoint_activations(args.checkpoint_activations)
        if args.mlp_norm:
            exchange_norm(encoder, args.mlp_norm)
        size = args.mask_ratio, args.decoder_depth, args.decoder_embed_dim
        mae = DECODERS[args.decoder](encoder, *size, args.norm_pix_loss, args.backend)
        grid = args.input_size // encoder.patch_size
        random_mask(1, grid, grid, args.mask_ratio)  # so that a ratio that cannot be drawn is found now
    return mae


def draw_masks(args: argparse.Namespace, batch: Batch, grid: int) -> torch.Tensor:
    """The batch's part of its update's masks, which are drawn from (seed, update): the same however the update is divided."""
    generator = torch.Generator().manual_seed(mix_seed("mask", args.seed, batch.update))
    return random_mask(batch.images_in_update, grid, grid, args.mask_ratio, generator)[batch.part]


def sample_images(args: argparse.Namespace, count: int = 8) -> torch.Tensor:
    """Up to `count` validation images, spread over the set, uint8 (count, 3, S, S)."""
    split = "val" if args.data_set != "folder" or split_folder(args.data_path, "val") else "train"
    images = load_images(args.data_set, args.data_path, split, center_transform(args.input_size))
    count = min(count, len(images))
    return torch.stack([images[0, i * len(images) // count][0] for i in range(count)])


def draw(path: Path, mae: FCMAE, pixels: torch.Tensor, statistics: tuple, seed: int, records: list[dict]) -> None:
    """Beside `path` write reconstructions.png of uint8 `pixels` (N, 3, S, S), and loss.png from the log's records."""
    mae.eval()
    imgs = normalise(pixels, statistics, mae.mask_token.device)
    panels = reconstruction_panels(mae, imgs, torch.Generator().manual_seed(seed))
    mae.train()
    given = "; mean brightness and contrast of each hidden patch are given" if mae.norm_pix_loss else ""
    plot_panels(
        path.with_name("reconstructions.png"),
        {title: denormalise(panel, statistics) for title, panel in panels.items()},
        f"{mae.mask_ratio:.0%} of the patches hidden{given}",
    )
    records = [record for record in records if record["loss"] is not None]
    curve = [record["epoch"] for record in records], [record["loss"] for record in records]
    title = "Pre-training loss"
    plot_curves(path.with_name("loss.png"), {"loss": curve}, "epoch", "mean squared error on hidden patches", title)


if __name__ == "__main__":
    run_script(main, get_args)
