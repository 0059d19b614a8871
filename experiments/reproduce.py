"""The paper's claims, at a scale that anyone can rerun: one command for one claim, or for all of them.

    python -m experiments.reproduce --claim 1 2 --dry_run                     # the commands that it would run
    python -m experiments.reproduce --jobs 2                                  # two single-threaded jobs side by side
    python -m experiments.reproduce --claim 1 --condition sparse --seeds 12   # one number by each metric
    python -m experiments.reproduce --budget night --jobs 2                   # feature collapse, given time

Budgets, commands, metrics and claims are in claims.json. A job is done when its output exists; the same command runs
what is left. Rows have keys (claim, condition, metric, seed), and stay until a job that is done here replaces them. In
README.md, tables, figures and bold paragraphs are written here; all others are written by hand, and stay.
"""

import argparse
import csv
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import NamedTuple

from analyze import finish, tidy
from plumbing import cli
from plumbing.files import UserError, save_csv, save_json, versions, write_atomically
from plumbing.plots import COLOURS, new_figure, save_figure

ROOT = Path(__file__).parent.parent


class Condition(NamedTuple):
    """A network that claims compare, with the flags that set its pre-training and fine-tuning apart."""

    version: str = "V2"
    changes: str = ""
    then: str = ""
    metrics: dict[str, str] = {"fine-tuning": "finetune", "probe": "probe"}  # noqa: RUF012 (metric: command)
    tensor: str = "after GRN"  # of V2, whose tables also have the one before GRN
    paper: float | None = None  # Base, ImageNet-1K, fine-tuned


class Claim(NamedTuple):
    """A claim of the paper, as comparisons: "a above b", "a - b above c - d", or "a level with b"."""

    title: str
    expect: list[str]
    conditions: dict[str, Condition]


class Metric(NamedTuple):
    """A number from a job's table: a column's mean over layers, or over the last `part`-th of them."""

    quantity: str
    column: str
    minus: str = ""  # a column to subtract
    where: dict = cli.NONE  # column: value, of the rows that count
    part: int = 1
    least: float | None = None  # difference that counts if the paper has no number; None: only described
    digits: int = 1

    def of(self, rows: list[dict]) -> float:
        rows = [row for row in rows if all(row[name] == value for name, value in self.where.items())]
        layers = [*_grouped(rows, "layer").values()]
        rows = [row for layer in layers[-max(1, len(layers) // self.part) :] for row in layer if self.column in row]
        numbers = [float(row[self.column]) - float(row.get(self.minus, 0)) for row in rows]
        return statistics.fmean(number for number in numbers if not math.isnan(number))


SETTINGS = json.loads(Path(__file__).with_name("claims.json").read_text(encoding="utf-8"))
BUDGETS = {name: SETTINGS["budgets"]["laptop"] | budget for name, budget in SETTINGS["budgets"].items()}
METRICS = {name: Metric(**metric) for name, metric in SETTINGS["metrics"].items()}
CLAIMS = {name: Claim(**claim) for name, claim in SETTINGS["claims"].items()}
for claim in CLAIMS.values():
    claim.conditions.update({name: Condition(**settings) for name, settings in claim.conditions.items()})


class Job(NamedTuple):
    """A command, the last file that it writes, and the jobs that it needs first."""

    command: str
    output: Path
    needs: tuple["Job", ...] = ()

    def beside(self, name: str) -> Path:
        return self.output.with_name(name)


def unique(jobs: Iterable[Job]) -> list[Job]:
    """List every job once, after the jobs that it needs."""
    return list(dict.fromkeys(part for job in jobs for part in (*unique(job.needs), job)))


class Plan:
    """Makes a budget's jobs, in folders under `root`. Equal settings give equal jobs, so that claims share them."""

    def __init__(self, name: str, root: Path):
        self.name, self.budget, self.root = name, BUDGETS[name], root / name
        self.claims = {key: claim for key, claim in CLAIMS.items() if key.startswith("night") == (name == "night")}

    def job(self, name: str, seed: int, condition: Condition) -> Job:
        """Return the job of a command in claims.json."""
        stage, differs, output, command = SETTINGS["commands"][name].values()
        needs, root = (self.job(stage, seed, condition),) if stage else (), shlex.quote(self.root.as_posix())
        before, epochs = f"{root}/{needs[0].output.parent.name}" if needs else "", self.budget["epochs"]
        values = dict(seed=seed, before=before, model=self.budget[condition.version], **condition._asdict())
        values |= self.budget | dict(kept=1 if condition.changes else 100, labels=" ".join(map(str, epochs)))
        values |= dict(snapshots=" ".join(f"{before}/checkpoint-{epoch}.pth" for epoch in epochs), last=epochs[-1])
        folder = "-".join([*re.findall(r"[\w.]+", f"{name} {differs}".format_map(values)), f"seed{seed}"])
        command = re.sub(" +", " ", f"{command} --output_dir {root}/{folder}".format_map(values))
        return Job(command, self.root / folder / output.format_map(values), needs)

    def keys(self, names: Iterable[str], seed: int) -> dict[tuple, tuple[Job, Condition]]:
        """(claim, condition, metric, seed) -> the job that has the number."""
        conditions = {(name, key): c for name in names for key, c in self.claims[name].conditions.items()}
        items = [(*key, metric, command, c) for key, c in conditions.items() for metric, command in c.metrics.items()]
        return {(name, key, metric, seed): (self.job(command, seed, c), c) for name, key, metric, command, c in items}


def run_all(jobs: list[Job], side_by_side: int, photographs: str | None = None) -> None:
    """Run unfinished jobs, each in its own process. A failure or a signal ends all; running again continues them."""
    waiting, running = [job for job in jobs if not job.output.exists()], {}
    threads = max(1, int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count()) // side_by_side)
    options = dict(cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": str(threads)}, stderr=subprocess.STDOUT)
    git = subprocess.run(["git", "-C", ROOT, "describe", "--always", "--dirty", "--exclude", "*"], capture_output=True)
    hardware = f"{threads} of {os.cpu_count()} cores of {platform.processor() or platform.machine()}"
    facts = dict(commit=git.stdout.decode().strip(), hardware=hardware, versions=str(versions())[1:-1].replace("'", ""))
    handler = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        while waiting or running:
            ready = [job for job in waiting if all(n.output.exists() and n not in running for n in job.needs)]
            for job in ready[: side_by_side - len(running)]:
                waiting.remove(job)
                job.output.parent.mkdir(parents=True, exist_ok=True)
                save_json(job.beside("job.json"), facts | dict(started=time.time()))
                argv = [photographs if word == "DIR" else word for word in shlex.split(job.command)]
                with open(job.beside("output.txt"), "a") as file:
                    running[job] = subprocess.Popen([sys.executable, *argv], stdout=file, **options)
            time.sleep(0.1)
            for job in [job for job, process in running.items() if process.poll() is not None]:
                if running.pop(job).returncode or not job.output.exists():
                    raise UserError(f"a job failed, see {job.beside('output.txt')}; the same command tries again")
                print(f"{job.output.parent.name} is done; {len(waiting) + len(running)} left", flush=True)
    finally:
        for end, process in product((subprocess.Popen.terminate, subprocess.Popen.wait), running.values()):
            end(process)
        signal.signal(signal.SIGTERM, handler)


def _grouped(rows: Iterable[dict], column: str) -> dict[str, list[dict]]:
    groups = {}
    for row in rows:
        groups.setdefault(row[column], []).append(row)
    return groups


def networks_of(job: Job, tensor: str = "after GRN") -> dict[str, list[dict]]:
    """Group the rows that analyze.py wrote by network, of `tensor` if there are two; or a training's log by epoch."""
    if job.output.suffix == ".pth":
        records = map(json.loads, job.beside("log.jsonl").read_text().splitlines())
        return _grouped((record | dict(epoch=math.ceil(record["epoch"]), layer="") for record in records), "epoch")
    table = csv.DictReader(job.output.read_text(encoding="utf-8").splitlines())
    rows = [dict(layer=row.get("block")) | row for row in table]
    return _grouped([row for row in rows if row.get("tensor") == tensor] or rows, "checkpoint")


def recorded_rows(results: Path) -> dict[tuple, list[dict]]:
    """Read the tables' rows by (claim, condition, metric, seed); a course over pre-training has several rows."""
    rows = {}
    for path in sorted(results.glob("*.csv")):
        name = path.stem.removeprefix("claim_").replace("_", " ")
        for row in csv.DictReader(path.read_text(encoding="utf-8").splitlines()):
            rows.setdefault((name, row["condition"], row["metric"], int(row["seed"])), []).append(row)
    return rows


def rows_for(key: tuple, job: Job, condition: Condition, recorded: dict) -> list[dict]:
    """Return a key's rows and how they came about, if its job is done here; else those in `recorded`."""
    if key[2] == "maps" or not job.output.exists():
        return recorded.get(key, [])
    metric, networks = METRICS[key[2]], networks_of(job, condition.tensor)
    row = dict(zip(("condition", "metric", "seed"), map(str, key[1:])))  # strings, as in rows on file
    if key[0].endswith("course"):
        rows = []
        for epoch, table in networks.items():
            for k, part in enumerate([table, *_grouped(table, "layer").values()]):  # block 0: all of them
                rows.append(row | dict(block=k, epoch=epoch, value=f"{metric.of(part):.6g}"))
        return rows
    chain = [part for part in unique([job]) if part.beside("job.json").exists()]
    facts = [json.loads(part.beside("job.json").read_text()) for part in chain]
    minutes = sum(part.output.stat().st_mtime - fact["started"] for part, fact in zip(chain, facts)) / 60
    row |= dict(value=f"{metric.of([*networks.values()][-1]):.6g}", minutes=f"{minutes:.3g}")
    row |= dict(command=" && ".join(f"python {part.command}" for part in unique([job])))
    return [row | {k: "; ".join(dict.fromkeys(fact[k] for fact in facts)) for k in ("commit", "hardware", "versions")}]


# Student's t, 97.5%, by degrees of freedom from 1 to 10; more take the last, which is slightly too strict.
T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)
TIE = 2.0  # points of accuracy: conditions whose difference is certainly smaller are level
SEEN, NOT_SEEN, OPPOSITE = "seen here", "not seen at this scale", "opposite here"
SHORT = {SEEN: "seen", NOT_SEEN: "not seen", OPPOSITE: "opposite"}


class Difference(NamedTuple):
    """A comparison by one metric, paired by seed, over the seeds that all its conditions have."""

    text: str
    metric: str
    values: list[float]  # one per seed
    least: float = 0.0  # least difference that counts
    paper: float | None = None

    def papers(self) -> str:
        return "" if self.paper is None else f"{self.paper:+.1f}"

    def judged(self) -> tuple[float, float, str, bool]:
        """Return the mean, half its 95% interval, the word, and whether it decides against a claim.

        Seen if the interval is above zero, opposite if below; "level with": seen if within `TIE` of zero, opposite if
        beyond. A difference not seen, and certainly less than counts, also decides against a claim.
        """
        n, mean = len(self.values), statistics.fmean(self.values)
        margin = math.inf if n < 2 else T[min(n - 1, len(T)) - 1] * statistics.stdev(self.values) / math.sqrt(n)
        seen, opposite, less = mean > margin, -mean > margin, mean + margin < self.least
        if " level with " in self.text:
            seen, opposite, less = abs(mean) + margin < TIE, abs(mean) - margin > TIE, False
        return mean, margin, SEEN if seen else OPPOSITE if opposite else NOT_SEEN, not seen and (opposite or less)

    def __str__(self) -> str:
        (mean, margin, *_), d = self.judged(), METRICS[self.metric].digits
        return f"{mean:+.{d}f} [{mean - margin:+.{d}f}, {mean + margin:+.{d}f}]"


def compare(claim: Claim, values: dict[str, dict[str, dict[int, float]]]) -> list[Difference]:
    """Compare values (condition -> metric -> seed -> number), by metrics with a seed that all conditions share."""
    differences = []
    for text, (metric, settings) in product(claim.expect, METRICS.items()):
        sides = [side.split(" - ") for side in re.split(" above | level with ", text)]
        signs = {name: (-1) ** (i + j) for i, side in enumerate(sides) for j, name in enumerate(side)}
        known = {name: claim.conditions[name].paper for name in signs}
        paper = None if None in known.values() else sum(signs[name] * known[name] for name in signs)
        numbers = {name: values.get(name, {}).get(metric, {}) for name in signs}
        seeds = sorted(set.intersection(*map(set, numbers.values())))
        if seeds and settings.least:
            sums = [sum(signs[name] * numbers[name][seed] for name in signs) for seed in seeds]
            differences.append(Difference(text, metric, sums, (paper or 2 * settings.least) / 2, paper))
    return differences


def verdict(differences: list[Difference], expected: int) -> tuple[str, Difference]:
    """Return a claim's word, and the first comparison that gives it. One metric decides, unless another contradicts.

    A metric shows a claim if it shows all its `expected` comparisons, and contradicts it if one decides against it.
    """
    words = _grouped([dict(metric=d.metric, word=d.judged()[2]) for d in differences], "metric")
    seen = [metric for metric, part in words.items() if [row["word"] for row in part] == [SEEN] * expected]
    against = {d.judged()[2] for d in differences if d.judged()[3]}
    word = SEEN if seen and not against else OPPOSITE if OPPOSITE in against and not seen else NOT_SEEN
    first = [d for d in differences if d.judged()[2] == word and (word != SEEN or d.metric in seen)]
    return word, (first or differences)[0]


def draw(claim: Claim, differences: list[Difference], path: Path) -> None:
    """Draw every difference with its interval, seeds as points, the least that counts, and the paper's value."""
    names, metrics = (list(dict.fromkeys(d[k] for d in differences)) for k in (0, 1))
    figure, [[axis]] = new_figure(1, 1, 8.5, 2 + 0.55 * len(names))
    axis.axvline(0, color="black", linewidth=1)
    for d in differences:
        (mean, margin, *_), k, row = d.judged(), metrics.index(d.metric), names.index(d.text)
        y, x = row + 0.25 * (k - (len(metrics) - 1) / 2), [-TIE, TIE] if " level with " in d.text else [d.least]
        axis.errorbar(mean, y, xerr=margin if len(d.values) > 1 else 0, fmt="o", color=COLOURS[k], label=d.metric)
        axis.scatter(d.values, [y] * len(d.values), color="black", s=14, alpha=0.6, linewidth=0, zorder=3)
        axis.plot(x, [y] * len(x), "|", color="black", markersize=12, label="what counts")
        if d.paper is not None:
            axis.plot(d.paper, row, "D", color="black", fillstyle="none", label="the paper's")
    axis.set_ylim(len(names) - 0.5, -0.5)
    tidy(axis, "points of accuracy" if "%" in METRICS[metrics[0]].quantity else METRICS[metrics[0]].quantity, "")
    axis.set_yticks(range(len(names)), names)
    save_figure(finish(figure, claim.title), path)


def draw_course(rows: list[dict], path: Path) -> None:
    """Draw metrics over pre-training, a line per seed; above channel maps beside `path`, the last block's collapse."""
    from matplotlib.image import imread

    networks, maps = sorted({row["condition"] for row in rows}), sorted(path.parent.glob(f"{path.stem}_*.png"))
    last = max(int(row["block"]) for row in rows)
    panels = [("dead", last), ("collapse", last), ("collapse", 0)] if maps else product(METRICS, [0])
    panels = [panel for panel in panels if any((row["metric"], int(row["block"])) == panel for row in rows)]
    figure, axes = new_figure(2, 3, 11, 6)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, (metric, block) in zip(axes.flat, panels):
        for network, seed in sorted({(row["condition"], row["seed"]) for row in rows}):
            key = network, seed, metric, block
            line = [row for row in rows if (row["condition"], row["seed"], row["metric"], int(row["block"])) == key]
            x, y = ([float(row[name]) for row in line] for name in ("epoch", "value"))
            axis.plot(x, y, "o-", color=COLOURS[networks.index(network)], markersize=3, alpha=0.7, label=network)
        title = METRICS[f"{metric}, last block" if block else metric].quantity
        tidy(axis, "epochs of pre-training", "", title)
    for axis, file in zip(axes[1], maps):
        axis.imshow(imread(file))
        axis.set_title(file.stem.removeprefix(f"{path.stem}_"), fontsize=12)
    save_figure(finish(figure, ""), path)


def _markdown(*rows: list) -> str:
    return "\n".join(f"|{'|'.join(map(str, row))}|" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:]))


def table(claim: Claim, values: dict, differences: list[Difference]) -> str:
    """Tabulate mean and standard deviation of every condition, then every comparison."""
    metrics = [name for name in METRICS if any(name in numbers for numbers in values.values())]
    rows = [["", "seeds", "the paper", *(METRICS[name].quantity for name in metrics)]]
    for name, numbers in values.items():
        cells = dict.fromkeys(metrics, "")
        for metric, seeds in numbers.items():
            parts = statistics.fmean(seeds.values()), statistics.stdev(seeds.values()) if len(seeds) > 1 else math.nan
            cells[metric] = "{:.{d}f}±{:.{d}f}".format(*parts, d=METRICS[metric].digits)
        rows.append([name, max(map(len, numbers.values())), claim.conditions[name].paper or "", *cells.values()])
    for text in dict.fromkeys(d.text for d in differences):
        cells = {d.metric: f"{d}, {SHORT[d.judged()[2]]}" for d in differences if d.text == text}
        d = next(d for d in differences if d.text == text)
        rows.append([text, len(d.values), d.papers(), *(cells.get(metric, "") for metric in metrics)])
    return _markdown(*rows)


def write_results(plan: Plan, seeds: Iterable[int], results: Path) -> None:
    """Write README.md, and a CSV and a figure per claim, from all jobs that are done and all rows on file."""
    results.mkdir(parents=True, exist_ok=True)
    recorded, page, sections, count = recorded_rows(results), results / "README.md", {}, 0
    seeds = sorted({*seeds, *plan.budget["seeds"], *(key[3] for key in recorded)})
    top = [["claim", "the paper", "here, with 95% interval", ""]]
    for name, claim in plan.claims.items():
        keys = {key: settings for seed in seeds for key, settings in plan.keys([name], seed).items()}
        rows = [row for key, settings in keys.items() for row in rows_for(key, *settings, recorded)]
        values, path = {}, results / f"claim_{name.replace(' ', '_')}.png"
        for row in rows:
            numbers = values.setdefault(row["condition"], {}).setdefault(row["metric"], {})
            numbers[int(row["seed"])] = float(row["value"])
        image, differences = f"![{claim.title}]({path.name})", compare(claim, values)
        if rows:
            save_csv(path.with_suffix(".csv"), rows)
        if differences:
            draw(claim, differences, path)
            count, (word, d) = count + len(differences), verdict(differences, len(claim.expect))
            needed = [key for key in keys if key[3] in plan.budget["seeds"]]
            word += ", so far" * any(key[3] not in values.get(key[1], {}).get(key[2], {}) for key in needed)
            top.append([f"{name}. {claim.title}: {d.text}, {d.metric}", d.papers(), d, word])
            image = f"**{word.capitalize()}.** {image}\n\n{table(claim, values, differences)}"
        elif rows and not claim.expect:
            for network, job in ((key[1], job) for key, (job, _) in keys.items() if key[2] == "maps"):
                if f"seed{plan.budget['seeds'][0]}" in job.output.parent.name and job.output.exists():
                    shutil.copy(job.beside("activations.png"), results / f"{path.stem}_{network}.png")
            draw_course(rows, path)
        else:
            top += [[f"{name}. {claim.title}", "", "", "not run yet"]] if claim.expect else []
            continue
        sections[f"{name}. {claim.title}"] = [image]
    chance = f"**{count} comparisons**: if all were true ties, about {count / 20:.1f} would seem to differ."
    sections = {f"The paper's claims at the {plan.name} budget": [_markdown(*top), chance], **sections}
    old = re.split(r"^#+ ", page.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:] if page.exists() else []
    for heading, *paragraphs in (part.strip().split("\n\n") for part in old):
        sections.setdefault(heading, []).extend(p for p in paragraphs if not p.startswith(("|", "![", "**")))
    text = "\n\n## ".join("\n\n".join([heading, *paragraphs]) for heading, paragraphs in sections.items())
    write_atomically(page, lambda file: file.write_text(f"# {text}\n", encoding="utf-8"))
    print(f"wrote {page}")


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.Parser(description=__doc__.split("\n\n")[0])
    add, about = parser.add_argument, "; ".join(f"{name}: {budget['about']}" for name, budget in BUDGETS.items())
    add("--budget", choices=BUDGETS, default="laptop", metavar="NAME", help=about)
    add("--claim", choices=CLAIMS, nargs="+", metavar="NAME", help=", ".join(CLAIMS))
    add("--condition", nargs="+", metavar="NAME", help="only these, named as in the tables (default: all)")
    add("--seeds", type=cli.number(int, 0), nargs="+", metavar="SEED", help="seeds to run (default: the budget's)")
    add("--missing", action=cli.BoolFlag, default=False, help="run only what the tables in --results lack")
    add("--data_path", metavar="DIR", help="for --budget photographs: DIR/train/<class>/ and DIR/val/<class>/")
    add("--jobs", type=cli.count, default=1, help="jobs side by side, which divide the cores")
    add("--dry_run", action=cli.BoolFlag, default=False, help="only print the commands of the jobs that are not done")
    add("--output_dir", default="runs/reproduce", metavar="DIR", help="where the jobs run, in a folder per budget")
    place = "page, tables and figures (of other budgets than laptop in a folder)"
    add("--results", default="results", metavar="DIR", help=place)
    args = parser.parse_args(argv)
    if ("DIR" in BUDGETS[args.budget]["common"]) != bool(args.data_path):
        parser.error(f"--budget {args.budget} {'takes no' if args.data_path else 'needs'} --data_path DIR")
    return args


def main(args: argparse.Namespace) -> None:
    """Run what `args` (from `get_args`) ask for, and write the results."""
    plan, results = Plan(args.budget, Path(args.output_dir)), Path(args.results, args.budget.replace("laptop", ""))
    seeds, recorded = args.seeds or plan.budget["seeds"], recorded_rows(results) if args.missing else {}
    keys = {key: job for seed in seeds for key, (job, _) in plan.keys(args.claim or plan.claims, seed).items()}
    recorded |= {(*key[:2], "maps", key[3]): [] for key in recorded}  # maps come with the others
    jobs = unique(job for key, job in keys.items() if key not in recorded and key[1] in (args.condition or key))
    if args.dry_run:
        print("\n".join(f"python {job.command}" for job in jobs if not job.output.exists()))
        return
    try:
        run_all(jobs, args.jobs, args.data_path)
    finally:
        write_results(plan, seeds, results)


if __name__ == "__main__":
    main(get_args())
