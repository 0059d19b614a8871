"""Is pre-training worth it on your own images? Ordinary runs of the scripts answer, within a budget of time.

    python -m experiments.worth --data_path DIR --minutes 30 --flags --input_size 64 --stem_stride 2
    python -m experiments.worth --data_path DIR --minutes 30 --init_weight FILE_OR_URL

DIR holds train/<class>/ and val/<class>/. A third of the time goes to pre-training, from the given weights or random
ones. Then every start is fine-tuned for the same number of epochs, with three seeds, or fewer if time is short. The
same command continues where it was stopped. Writes worth.csv and worth.png.
"""

import argparse
import csv
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean, stdev, variance

import weights
from plumbing import cli
from plumbing.files import UserError, file_of_run, load_file, make_directory, save_csv
from plumbing.plots import COLOURS, new_figure, save_figure

LEAST, MOST = 10, 50  # epochs of fine-tuning


def run_job(folder: Path, output: str, *command: str | int | Path) -> float:
    """Run or continue a job, unless its output is in its folder; return the seconds it took. UserError if it fails."""
    script, *flags = map(str, (*command, "--output_dir", make_directory(folder)))
    clock, start = folder / "seconds.txt", time.time()
    seconds = float(clock.read_text()) if clock.exists() else 0.0
    if not (folder / output).exists():
        print(f"{folder.name}: {script} {' '.join(flags)}", flush=True)
        with open(folder / "output.txt", "a") as file:
            command = [sys.executable, str(Path(__file__).parents[1] / script), *flags]
            status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT).returncode
        seconds += time.time() - start
        clock.write_text(str(seconds))
        if status:
            raise UserError(f"{folder.name} failed: {(folder / 'output.txt').read_text().strip().splitlines()[-1]}")
    return seconds


def fitting_epochs(seconds: float, folder: Path, *command: str | int | Path) -> int:
    """Estimate how many epochs fit into `seconds`, from a job of one epoch."""
    whole = run_job(folder, "checkpoint-1.pth", *command, "--epochs", 1, "--disable_eval")
    epoch = json.loads((folder / "log.jsonl").read_text().splitlines()[-1])["seconds"]
    return 1 + max(0, int((seconds - whole) / max(epoch, 0.1)))  # the log rounds to tenths: a short epoch takes 0.0


def verdict(top1: dict[str, list[float]], minutes: float) -> str:
    """Give advice by the starts' means and their spread over seeds; the last start is the one pre-trained here."""
    *before, (_, here) = top1.items()
    best, values = max(before, key=lambda item: fmean(item[1]))
    gain, seeds = fmean(here) - fmean(values), len(here)
    error = 2 * ((variance(here) + variance(values)) / seeds) ** 0.5 if seeds > 1 else math.inf
    advice = "Pre-train on these images" if gain > 0 else f"Fine-tune from {best} weights"
    result = f"{minutes:.1f} minutes of pre-training brought {gain:+.1f} points over {best} weights"
    return f"{advice if abs(gain) > error else 'Not decided'}: {result} (twice the standard error: {error:.1f})."


def draw(path: Path, rows: list[dict], top1: dict[str, list[float]]) -> None:
    """Draw a dot for each seed, and a line at the mean."""
    figure, [[axis]] = new_figure(1, 1, 2 + 2 * len(rows), 4)
    for k, (row, values, colour) in enumerate(zip(rows, top1.values(), COLOURS)):
        axis.hlines(row["top1"], k - 0.2, k + 0.2, colour, linewidth=3)
        axis.plot([k] * len(values), values, "o", color=colour, alpha=0.6)
    axis.set_xticks(range(len(rows)), ["{start}\n{top1:.1f}%, {minutes:.1f} min".format(**row) for row in rows])
    axis.set(xlim=(-0.5, len(rows) - 0.5), ylabel="top-1 on val/, %", title="line: mean; dot: a seed")
    axis.set_ylim(0, 5 + max(map(max, top1.values())))
    save_figure(figure, path)


def main(args: argparse.Namespace) -> None:
    """Run what is left of the comparison, and write the table and the figure."""
    given = args.init_weight and file_of_run(args.init_weight, "checkpoint-best.pth", "encoder.pth", "newest")
    taken = [f"--{name}={value}" for name, value in weights.flags_of(given, "input_size").items()] if given else []
    flags, start = ["--data_path", args.data_path, *taken, *args.flags], ["--init_weight", given] if given else []
    directory, total = make_directory(args.output_dir), 60 * args.minutes
    file, line = directory / "flags.txt", " ".join([*flags, *start, f"--minutes={args.minutes}"])
    if file.exists() and file.read_text() != line:
        raise UserError(f"{directory} is of {file.read_text()}; choose another --output_dir")
    file.write_text(line)

    pretrain = "pretrain.py", *flags, *start, "--disable_eval", "--batch_size", 16, "--lr", 5e-4
    epochs = fitting_epochs(total / 3, directory / "trial_pretrain", *pretrain)
    pretraining = run_job(directory / "pretrain", f"checkpoint-{epochs}.pth", *pretrain, "--epochs", epochs)
    starts = {"random": None} | ({"published": given} if given else {})
    starts["pre-trained"] = directory / "pretrain/encoder.pth"
    names = [*starts][:0:-1]  # the one pre-trained here first: analyze.py takes the image size from it
    probe = "--checkpoint", *map(starts.get, names), "--label", *names, "--untrained", "--data_path", args.data_path
    run_job(directory / "probe", "probe.csv", "analyze.py", "probe", *probe)
    table = csv.DictReader((directory / "probe/probe.csv").read_text().splitlines())
    frozen = {(row["checkpoint"], row["features"]): float(row["accuracy"]) for row in table}
    finetune, budget = ("finetune.py", *flags, "--recipe", "few", "--eval_freq", MOST), 0.6 * total / (3 * len(starts))
    fitting, rows, top1 = fitting_epochs(budget, directory / "trial_finetune", *finetune, "--scratch"), [], {}
    epochs, seeds = min(MOST, max(LEAST, fitting)), min(3, max(1, 3 * fitting // LEAST))
    for start, path in starts.items():
        source, seconds = ["--finetune", path] if path else ["--scratch"], []
        for seed in range(seeds):
            folder, command = directory / f"{start}-{seed}", (*finetune, *source, "--epochs", epochs, "--seed", seed)
            seconds.append(run_job(folder, f"checkpoint-{epochs}.pth", *command))
            top1.setdefault(start, []).append(load_file(folder / "checkpoint-best.pth")["top1"])
        label, std = start.replace("random", "untrained"), stdev(top1[start]) if seeds > 1 else math.nan
        row = dict(start=start, knn=frozen[label, "10 nearest"], probe=frozen[label, "stages 3, 4"], seeds=seeds)
        minutes = (fmean(seconds) + (pretraining if start == "pre-trained" else 0)) / 60
        rows.append(row | dict(top1=fmean(top1[start]), std=std, minutes=minutes))
    save_csv(directory / "worth.csv", rows)
    draw(directory / "worth.png", rows, top1)
    for row in (dict(zip(rows[0], rows[0])), *rows):
        print("".join(f"{value:12.1f}" if isinstance(value, float) else f"{value:>12}" for value in row.values()))
    print(f"{verdict(top1, pretraining / 60)}\nin {directory}: worth.csv and worth.png")


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.Parser(description=__doc__.split("\n\n")[0])
    add, more = parser.add_argument, "given to pretrain.py and finetune.py, such as --flags --input_size 64"
    add("--data_path", required=True, metavar="DIR", help="folder with train/<class>/ and val/<class>/")
    add("--init_weight", metavar="PATH", help="weights to go on from: a file, a run or an address")
    add("--minutes", type=cli.positive, default=30, help="budget of time")
    add("--output_dir", default="runs/worth", metavar="DIR", help="where everything is written")
    add("--flags", nargs=argparse.REMAINDER, default=[], metavar="...", help=f"the rest of the line, {more}")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(get_args())
