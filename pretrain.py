"""Pre-train a ConvNeXt encoder as a masked autoencoder (FCMAE, paper Sec. 3 and Tab. 8).

    python pretrain.py                                         # embedded data, minutes on a laptop
    python pretrain.py --data_path DIR                         # any folder of images, the paper's recipe
    torchrun --nproc_per_node=8 pretrain.py --data_path DIR    # several GPUs; see the README for several machines

Flags follow the authors' release. Writes encoder.pth, checkpoints, log.jsonl, config.json and pictures to --output_dir.
"""

import argparse
import math
from contextlib import nullcontext
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

import common
from common import BoolFlag, Parser, Processes, UserError, mix_seed, number, one_of
from data import (
    DATA_SETS,
    EpochSampler,
    HeldImages,
    Unreadable,
    center_transform,
    choose_data_set,
    denormalise,
    hold,
    load_images,
    make_loader,
    normalise,
    pretrain_transform,
)
from decoders import DECODERS
from fcmae import BACKENDS, FCMAE, random_mask, reconstruction_panels
from model import MODELS
from variants import MLP_NORMS, choose_mlp_norm

# Defaults that depend on the data. Folders get the paper's recipe (Tab. 8); small images get a small stem and a short run.
DEFAULTS = {
    "folder": dict(input_size=224, stem_stride=4, decoder_embed_dim=512, batch_size=64, epochs=800, blr=1.5e-4),
    "cifar10": dict(input_size=32, stem_stride=1, decoder_embed_dim=512, batch_size=256, epochs=200, blr=6e-4),
    "embedded": dict(input_size=48, stem_stride=1, decoder_embed_dim=256, batch_size=32, epochs=3, blr=8e-3),
}
DEFAULTS["cifar100"] = DEFAULTS["cifar10"]


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line and fill in the defaults that depend on the data set."""
    parser = Parser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    count, positive = number(int, 1), number(float, 0, above=True)
    by_data = "default: by data set, see DEFAULTS"

    group = parser.add_argument_group("model")
    add = group.add_argument
    add("--model", type=one_of("model", MODELS), default="convnextv2_atto", metavar="NAME", help=", ".join(MODELS))
    add(
        "--stem_stride",
        type=int,
        choices=(4, 2, 1),
        default=argparse.SUPPRESS,
        help=f"stride of the stem; a patch is 8 x this wide ({by_data})",
    )
    add("--mask_ratio", type=number(float, 0, 1, above=True, below=True), default=0.6, help="share of the patches to hide")
    add("--norm_pix_loss", action=BoolFlag, default=True, help="predict pixels normalised per patch")
    add("--mlp_norm", type=one_of("norm", MLP_NORMS), default=None, metavar="NAME", help=f"in GRN's place: {', '.join(MLP_NORMS)}")
    add("--decoder", type=one_of("decoder", DECODERS), default="convnext", metavar="NAME", help=", ".join(DECODERS))
    add("--decoder_depth", type=number(int, 0, 100), default=1, help="blocks of the decoder; of a U-Net, on each of its grids")
    add("--decoder_embed_dim", type=number(int, 1, 8192), default=argparse.SUPPRESS, help=f"width of the decoder ({by_data})")
    add(
        "--backend",
        type=one_of("backend", BACKENDS),
        default="sparse",
        metavar="NAME",
        help=f"how the encoder runs: {', '.join(BACKENDS)}",
    )

    group = parser.add_argument_group("data")
    add = group.add_argument
    add("--data_path", default=None, metavar="DIR", help="folder of images, or where CIFAR lies; none: the embedded data")
    add("--data_set", type=one_of("data set", DATA_SETS), default=None, metavar="NAME", help=f"{', '.join(DATA_SETS)}")
    add(
        "--input_size",
        type=common.image_side,
        default=argparse.SUPPRESS,
        help=f"pixels per side of the network's input ({by_data})",
    )
    add(
        "--num_workers",
        type=common.worker_count,
        default=None,
        help="loading processes per training process (default: up to 8 for folders, else 0)",
    )
    add("--pin_mem", action=BoolFlag, default=True, help="pinned host memory for faster transfer to a GPU")
    add(
        "--hold_data",
        action=BoolFlag,
        default=None,
        help="hold CIFAR or the embedded data on the device and crop and flip there (default: on GPUs, if nothing else is drawn)",
    )

    group = parser.add_argument_group("optimisation")
    add = group.add_argument
    add("--batch_size", type=count, default=argparse.SUPPRESS, help=f"images per process and forward pass ({by_data})")
    add("--update_freq", type=count, default=1, help="forward passes per update: gradient accumulation")
    add("--epochs", type=count, default=argparse.SUPPRESS, help=f"passes over the data ({by_data})")
    add("--warmup_epochs", type=number(float, 0), default=None, help="epochs of linear warm-up (default: 40, or 5%% of short runs)")
    either = group.add_mutually_exclusive_group().add_argument
    either(
        "--blr",
        type=positive,
        default=argparse.SUPPRESS,
        help=f"base learning rate per 256 images; lr = blr * batch / 256 ({by_data})",
    )
    either("--lr", type=positive, default=None, help="learning rate itself, instead of --blr")
    add("--min_lr", type=number(float, 0), default=0.0, help="learning rate at the end of the cosine")
    add("--weight_decay", type=number(float, 0), default=0.05, help="AdamW's weight decay")
    add("--clip_grad", type=positive, default=None, help="clip the gradient's norm to this (default: no clipping)")

    common.add_run_flags(parser, "runs/pretrain")

    args = parser.parse_args(argv)
    args.data_set = choose_data_set(args.data_set, args.data_path)
    for name, value in DEFAULTS[args.data_set].items():
        setattr(args, name, getattr(args, name, value))
    common.check_grid(args, parser)
    if args.warmup_epochs is None:
        args.warmup_epochs = min(40.0, 0.05 * args.epochs)
    common.check_epochs(args, parser)
    return args


def main(args: argparse.Namespace) -> None:
    """Pre-train as `args` (from `get_args`) say."""
    processes = common.setup_processes(args.device, args.timeout_minutes)
    common.set_determinism(args.deterministic)
    with common.run_directory(args.output_dir, processes) as output_dir:
        train(args, processes, output_dir)


def train(args: argparse.Namespace, processes: Processes, output_dir: Path) -> None:
    """Train the autoencoder, writing its encoder and pictures with the checkpoints of epochs."""
    device, world_size = processes.device, processes.world_size
    amp_dtype = common.autocast_dtype(args.amp, device)

    # --- data
    with common.main_process_first():
        images = load_images(args.data_set, args.data_path, "train", pretrain_transform(args.input_size), args.seed)
    images = hold(images, args.hold_data, device)
    args.hold_data = isinstance(images, HeldImages)
    batch_size = min(args.batch_size, len(images) // world_size)
    if batch_size == 0:
        raise UserError(f"{len(images)} images are too few for {world_size} processes; lower torchrun's --nproc_per_node")
    sampler = EpochSampler(len(images), batch_size, processes.rank, world_size, args.seed)
    workers = common.count_workers(args.num_workers, args.data_set, processes)
    loader = common.TimedLoader(make_loader(images, sampler, workers, args.pin_mem and device.type == "cuda"))
    unreadable = Unreadable(images)

    # --- model
    torch.manual_seed(args.seed)
    mlp_norm = choose_mlp_norm(args.mlp_norm, args.model)
    encoder = MODELS[args.model](num_classes=0, stem_stride=args.stem_stride, mlp_norm=mlp_norm)
    grid = args.input_size // encoder.patch_size
    try:
        mae = FCMAE(
            encoder, args.mask_ratio, args.decoder_depth, args.decoder_embed_dim, args.norm_pix_loss, args.backend, args.decoder
        )
        random_mask(1, grid, grid, args.mask_ratio)
    except ValueError as error:
        raise UserError(str(error)) from None
    encoder.checkpoint_activations(args.checkpoint_activations)
    common.to_device(mae, device)

    # --- optimiser
    batches = len(sampler)  # forward passes per epoch
    updates = math.ceil(batches / args.update_freq)  # per epoch
    images_per_update = batch_size * min(args.update_freq, batches) * world_size
    peak_lr = common.peak_learning_rate(args, images_per_update)
    optimizer = torch.optim.AdamW(
        common.parameter_groups(mae, args.weight_decay), lr=peak_lr, betas=(0.9, 0.95), fused=device.type in ("cuda", "cpu")
    )
    scaler = common.make_scaler(device, amp_dtype)

    # --- resume
    config = vars(args) | {"images": len(images), "images_in_update": images_per_update, "updates_per_epoch": updates}
    config |= {"processes": world_size, "images_per_forward": batch_size * world_size}
    config |= {"images_per_epoch": batches * batch_size * world_size}
    state = common.load_run(output_dir, args, config, "pretrain.py", processes)
    if state["path"]:
        common.restore(state, mae, optimizer, scaler)
    first_epoch, first_update = state["epoch"], state["update"]
    if first_epoch >= args.epochs:
        if processes.is_main:
            print(f"{output_dir} has already finished its {args.epochs} epochs; choose another --output_dir for a new run")
        return

    network = torch.compile(mae) if args.compile else mae
    if world_size > 1:
        network = DistributedDataParallel(network, gradient_as_bucket_view=True)

    if processes.is_main:
        print(f"{args.model} with decoder: {sum(p.numel() for p in mae.parameters()):,} parameters")
        patches = f"{grid} x {grid} patches, {args.mask_ratio:.0%} hidden"
        print(f"{args.data_set}: {len(images):,} images at {args.input_size} px, {patches}")
        print(f"{images_per_update} images per update, {updates} updates per epoch, {args.epochs} epochs, lr {peak_lr:.2e}")
        print(f"{world_size} x {device.type}, {'float32' if amp_dtype is None else args.amp or amp_dtype}, into {output_dir}")
        if state["path"]:
            print(f"continuing from {state['path']} at epoch {first_epoch}, update {first_update}")
    samples = sample_images(args) if processes.is_main else None
    log = common.RunLog(output_dir, updates, args.epochs, updates * first_epoch + first_update, state["log"], processes)
    meters = common.Meters(device, state["meters"], processes.rank)
    unreadable.indices = set(state["unreadable"])
    checkpoints = common.Checkpoints(output_dir, args, processes, log, meters)
    about = {"stage": "pretrain.py", "config": config, "versions": common.versions()}
    if processes.is_main:
        with log.writing("config.json"):
            common.save_json(output_dir / "config.json", config | {"versions": common.versions()})

    def save(epoch: int, update: int) -> None:
        state = {"model": mae.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()} | about
        checkpoints.save(epoch, update, state, unreadable.indices)

    # --- train
    mae.train()
    for epoch in range(first_epoch, args.epochs):
        sampler.epoch, sampler.first_batch = epoch, first_update * args.update_freq
        for batch, (pixels, _, failed) in enumerate(loader, sampler.first_batch):
            update, turn = divmod(batch, args.update_freq)
            turns = min(args.update_freq, batches - update * args.update_freq)  # an epoch's last update may have fewer
            step = epoch * updates + update
            if turn == 0:
                lr = common.learning_rate(step / updates, peak_lr, args.min_lr, args.warmup_epochs, args.epochs)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                # The masks of the whole update, then this rank's: the same however an update is divided among ranks.
                generator = torch.Generator().manual_seed(mix_seed("mask", args.seed, step))
                masks = random_mask(turns * world_size * batch_size, grid, grid, args.mask_ratio, generator)
                masks = masks.view(turns, world_size, batch_size, grid, grid)[:, processes.rank]
            unreadable.note(failed)

            imgs = normalise(images.render(pixels), images.statistics, device)
            last = turn == turns - 1
            with nullcontext() if last or world_size == 1 else network.no_sync():
                with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
                    loss, _, _ = network(imgs, mask=masks[turn])
                scaler.scale(common.guard(loss) / turns).backward()
            meters.add_loss(loss.detach() / turns)
            if not last:
                continue

            meters.end_update(common.apply_update(optimizer, scaler, args.clip_grad, amp_dtype))
            log.advance()
            if log.done % args.log_every == 0 or update + 1 == updates:
                unreadable.check(processes)
                record = log.report(meters, loader, images_per_update, lr, len(unreadable.indices))
                common.stop_if_diverging(record, output_dir)
            if checkpoints.due():
                save(epoch, update + 1)

        first_update = 0
        if checkpoints.due_at_end(epoch):
            if processes.is_main:  # before the checkpoint: after it, nothing of this epoch would be written again
                with log.writing("encoder.pth"):
                    common.save_tensors(output_dir / "encoder.pth", {"model": encoder.state_dict(), "config": config})
                with log.writing("pictures"):
                    draw(mae, samples.to(device), images.statistics, output_dir, args.seed, log.records())
            save(epoch + 1, 0)
    took = log.close()
    if processes.is_main:
        print(f"finished {args.epochs} epochs after {took}; in {output_dir}:")
        print("  encoder.pth (weights for fine-tuning), reconstructions.png, loss.png, log.jsonl, config.json")


def sample_images(args: argparse.Namespace, count: int = 8) -> torch.Tensor:
    """Up to `count` validation images, spread over the set, uint8 (count, 3, S, S)."""
    split = "val" if args.data_set != "folder" or (Path(args.data_path) / "val").is_dir() else "train"
    images = load_images(args.data_set, args.data_path, split, center_transform(args.input_size))
    count = min(count, len(images))
    return torch.stack([images[0, i * len(images) // count][0] for i in range(count)])


def draw(mae: FCMAE, pixels: torch.Tensor, statistics: tuple, output_dir: Path, seed: int, records: list[dict]) -> None:
    """Write reconstructions.png of uint8 `pixels` (N, 3, S, S), and loss.png from the log's records."""
    mae.eval()
    panels = reconstruction_panels(mae, normalise(pixels, statistics, pixels.device), torch.Generator().manual_seed(seed))
    mae.train()
    given = "; contrast and mean colour of each hidden patch are given" if mae.norm_pix_loss else ""
    common.plot_panels(
        output_dir / "reconstructions.png",
        {title: denormalise(panel, statistics) for title, panel in panels.items()},
        f"{mae.mask_ratio:.0%} of the patches hidden{given}",
    )
    records = [record for record in records if record["loss"] is not None]
    curve = [record["epoch"] for record in records], [record["loss"] for record in records]
    common.plot_curves(
        output_dir / "loss.png", {"loss": curve}, "epoch", "mean squared error on hidden patches", "Pre-training loss"
    )


if __name__ == "__main__":
    common.run_script(main, get_args)
