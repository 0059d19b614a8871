"""Is pre-training worth it on your own images? Ordinary runs of the scripts answer, within a budget of time.

    python -m experiments.worth --data_path DIR --minutes 30 --flags --input_size 64 --stem_stride 2
    python -m experiments.worth --data_path DIR --minutes 30 --init_weight FILE_OR_URL

DIR holds train/<class>/ and val/<class>/. A third of the time goes to pre-training, from the given weights or random
ones. Then every start is fine-tuned for the same epochs, with up to three seeds. The same command continues where it
was stopped, and adds seeds. Writes worth.csv and worth.png.
"""

import argparse
import csv
import json
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path

import weights
from plumbing import cli
from plumbing.files import UserError, file_of_run, make_directory, save_csv, save_json
from plumbing.plots import COLOURS, new_figure, save_figure

LEAST, MOST = 10, 50  # epochs of fine-tuning


class Jobs:
    """Ordinary runs in processes of their own; worth.json keeps the seconds that they took, and chosen epochs."""

    def __init__(self, directory: Path, flags: list[str]):
        self.directory, self.path = make_directory(directory), directory / "worth.json"
        self.state = json.loads(self.path.read_text()) if self.path.exists() else {"flags": flags, "seconds": {}}
        if self.state["flags"] != flags:
            raise UserError(f"{directory} is of {' '.join(self.state['flags'])}; choose another --output_dir")

    def run(self, name: str, output: str, *command: str | int | Path) -> Path:
        """Run or continue a job, unless its output is there; return that file. UserError if it fails."""
        folder = make_directory(self.directory / name)
        if not (folder / output).exists():
            print(f"{name}: {' '.join(map(str, command))}", flush=True)
            script, start = Path(__file__).parents[1] / command[0], time.time()
            command = [*map(str, (sys.executable, script, *command[1:], "--output_dir", folder))]
            with open(folder / "output.txt", "a") as file:
                status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT).returncode
            self.state["seconds"][name] = self.state["seconds"].get(name, 0) + time.time() - start
            save_json(self.path, self.state)
            if status:
                raise UserError(f"{name} failed: {(folder / 'output.txt').read_text().strip().splitlines()[-1]}")
        return folder / output

    def epochs(self, seconds: float, name: str, *command: str | int | Path) -> int:
        """Count the epochs that fit into `seconds` by a run of one, and keep that number."""
        trial = self.run(name, "checkpoint-1.pth", *command, "--epochs", 1)
        epoch = max(0.1, last(trial, "seconds"))  # the log rounds to tenths: a short epoch takes 0.0
        fitting = 1 + max(0, int((seconds - self.state["seconds"][name]) / epoch))
        epochs = self.state.setdefault(f"epochs after {name}", fitting)
        save_json(self.path, self.state)
        return epochs


def last(checkpoint: Path, key: str) -> float:
    """Return the last value of `key` in the log of a run."""
    records = map(json.loads, checkpoint.with_name("log.jsonl").read_text().splitlines())
    return [record[key] for record in records if key in record][-1]


def verdict(top1: dict[str, list[float]], minutes: float) -> str:
    """Advise by the means of the starts, of which the last is pre-trained here, and the spread of their seeds."""
    *before, (_, here) = top1.items()
    best, values = max(before, key=lambda item: statistics.fmean(item[1]))
    gain, seeds = statistics.fmean(here) - statistics.fmean(values), len(here)
    error = 2 * ((statistics.variance(here) + statistics.variance(values)) / seeds) ** 0.5 if seeds > 1 else math.inf
    advice = "Pre-train on these images" if gain > 0 else f"Fine-tune from {best} weights"
    result = f"{minutes:.1f} minutes of pre-training brought {gain:+.1f} points over {best} weights"
    return f"{advice if abs(gain) > error else 'Not decided'}: {result} (twice the standard error: {error:.1f})."


def draw(path: Path, rows: list[dict], top1: dict[str, list[float]]) -> None:
    """Draw a dot for each seed, and a line at the mean."""
    figure, [[axis]] = new_figure(1, 1, 2 + 2 * len(rows), 4)
    for k, row in enumerate(rows):
        axis.hlines(row["top1"], k - 0.2, k + 0.2, COLOURS[k], linewidth=3)
        axis.plot([k] * row["seeds"], top1[row["start"]], "o", color=COLOURS[k], alpha=0.6)
    texts = ("{start}\n{top1:.1f}%, {minutes:.1f} min".format(**row) for row in rows)
    axis.set_xticks(range(len(rows)), texts)
    top = 1.15 * max(map(max, top1.values()))
    axis.set(xlim=(-0.5, len(rows) - 0.5), ylim=(0, top or 1), ylabel="top-1 on val/, %")
    axis.set_title("Accuracy by start: a line at the mean, a dot for each seed")
    axis.grid(axis="y", alpha=0.3)
    save_figure(figure, path)


def main(args: argparse.Namespace) -> None:
    """Run what is left of the comparison, and write the table and the picture."""
    given = args.init_weight and file_of_run(args.init_weight, "checkpoint-best.pth", "encoder.pth", "newest")
    taken = [f"--{name}={value}" for name, value in weights.flags_of(given).items()] if given else []
    flags = ["--data_path", args.data_path, *taken, *args.flags, "--save_ckpt_num", "1"]
    jobs, begin, total = Jobs(Path(args.output_dir), flags), time.time(), 60 * args.minutes

    start = ["--init_weight", given] if given else []
    pretrain = "pretrain.py", *flags, *start, "--disable_eval", "--batch_size", 16, "--lr", 5e-4
    epochs = jobs.epochs(total / 3, "trial_pretrain", *pretrain)
    encoder = jobs.run("pretrain", f"checkpoint-{epochs}.pth", *pretrain, "--epochs", epochs).with_name("encoder.pth")
    starts = {"random": None} | ({"published": given} if given else {}) | {"pre-trained": encoder}
    names = [*starts][:0:-1]  # the one pre-trained here first: analyze.py takes the size of images from it
    probe = "--checkpoint", *map(starts.get, names), "--label", *names, "--untrained", "--data_path", args.data_path
    table = csv.DictReader(jobs.run("probe", "probe.csv", "analyze.py", "probe", *probe).read_text().splitlines())
    frozen = {(row["checkpoint"], row["features"]): float(row["accuracy"]) for row in table}

    finetune, took = ("finetune.py", *flags, "--recipe", "few", "--eval_freq", MOST), 0
    epochs = jobs.epochs(0.6 * total / len(starts) / 3, "trial_finetune", *finetune, "--scratch")
    epochs, top1 = min(MOST, max(LEAST, epochs)), {start: [] for start in starts}
    for seed in range(3):
        now = time.time()
        if seed and now + took > begin + total and f"random-{seed}" not in jobs.state["seconds"]:
            break
        for start, path in starts.items():
            more = *(["--finetune", path] if path else ["--scratch"]), "--epochs", epochs, "--seed", seed
            run = jobs.run(f"{start}-{seed}", f"checkpoint-{epochs}.pth", *finetune, *more)
            top1[start].append(last(run, "best_top1"))
        took = time.time() - now

    rows, seconds = [], jobs.state["seconds"]
    for start, values in top1.items():
        label, seeds = start.replace("random", "untrained"), len(values)
        row = dict(start=start, knn=frozen[label, "10 nearest"], probe=frozen[label, "stages 3, 4"], seeds=seeds)
        row |= dict(top1=statistics.fmean(values), std=statistics.stdev(values) if seeds > 1 else math.nan)
        spent = statistics.fmean(seconds[f"{start}-{seed}"] for seed in range(seeds))
        rows.append(row | dict(minutes=(spent + seconds["pretrain"] * (start == "pre-trained")) / 60))
    save_csv(jobs.directory / "worth.csv", rows)
    draw(jobs.directory / "worth.png", rows, top1)
    for row in (dict(zip(rows[0], rows[0])), *rows):
        print("".join(f"{value:12.1f}" if isinstance(value, float) else f"{value:>12}" for value in row.values()))
    print(f"{verdict(top1, seconds['pretrain'] / 60)}\nin {jobs.directory}: worth.csv and worth.png")


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data_path", required=True, metavar="DIR", help="folder with train/<class>/ and val/<class>/")
    parser.add_argument("--init_weight", metavar="PATH", help="weights to go on from: a file, a run or an address")
    parser.add_argument("--minutes", type=cli.positive, default=30, help="budget of time")
    parser.add_argument("--output_dir", default="runs/worth", metavar="DIR", help="where everything is written")
    more = "the rest of the line goes to pretrain.py and finetune.py, such as --flags --input_size 64"
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], metavar="...", help=more)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(get_args())
