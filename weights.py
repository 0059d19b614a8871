"""Convert weights between this project's names and everybody else's.

    python weights.py IN OUT --to timm      # or hf, mmpretrain, authors; IN may have any layout that is known here

In code: `load_weights(model, to_native(read_file(path)))`, or `build(to_native(read_file(path)))` for a network that fits.
"""

import plumbing  # isort: skip (first: Ctrl-C then ends the imports below, which take seconds, without a traceback)
import argparse
import os
from pathlib import Path

import torch

from plumbing.flags import Parser, merge, one_of
from plumbing.layouts import *  # noqa: F403 for `import weights`
from plumbing.layouts import build, describe, from_native, read_file, to_native, write_file
from plumbing.script import UserError, counted, run_script

TOP = {"native": "model", "authors": "model", "mmpretrain": "state_dict", "timm": None, "hf": None}  # as each library saves


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(description=__doc__.split("\n\n")[0])
    add = parser.adder()
    parser.add_argument(
        "input", metavar="IN", type=Path, help="weights to read: .pth, .pt, .bin or .safetensors, in any known layout"
    )
    parser.add_argument("output", metavar="OUT", type=Path, help="file to write: .pth, .pt, .bin or .safetensors")
    add("--to", one_of("layout", TOP), None, ", ".join(TOP), required=True)
    add("--model_ema", bool, False, "take a checkpoint's averaged weights instead of the raw ones")
    return merge(parser.parse_args(argv), parser.general)


def main(args: argparse.Namespace) -> None:
    """Convert a file, and print what was recognised and written."""
    if args.output.suffix not in (".pth", ".pt", ".bin", ".safetensors"):
        raise UserError(f"OUT {args.output} must end in .pth, .pt, .bin or .safetensors")
    given = read_file(args.input, args.model_ema)
    if os.path.exists(args.output) and args.output.samefile(args.input):  # unlike Path's, never raises
        raise UserError(f"OUT {args.output} is IN itself, which is never overwritten; choose another name")
    print(f"{args.input}: {describe(given)}")
    native = to_native(given)
    with torch.device("meta"):  # checks that nothing is missing, at no cost
        build({key: value.to("meta") for key, value in native.items()})
    written = from_native(native, args.to)
    write_file(args.output, written, TOP[args.to])
    print(f"{args.output}: {args.to} layout, {counted(len(written), 'tensor')}")


if __name__ == "__main__":
    run_script(main, get_args)
