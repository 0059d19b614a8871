"""The paper's claims, at a scale that anyone can rerun: one command for one claim, or for all of them.

    python reproduce.py --claim 1 2 --dry_run     # which jobs, and how long they take
    python reproduce.py --tune --jobs 2           # choose the recipes of fine-tuning
    python reproduce.py --claim 1 2 --jobs 2      # two single-threaded jobs side by side

Jobs are runs of pretrain.py, finetune.py and analyze.py, shared between claims. The same command continues where it was
stopped. Tables, figures and a README with verdicts are written to --results from all jobs that have finished; a
claim's table that is there already stays while more runs stand behind it.
"""

import plumbing  # isort: skip (first: Ctrl-C then ends the imports below, which take seconds, without a traceback)
import argparse
import contextlib
import csv
import importlib
import json
import math
import os
import platform
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import torch

from plumbing.files import find_checkpoints, prepare_output_dir, save_csv, save_json, versions, write_atomically
from plumbing.flags import Parser, count, merge, one_of
from plumbing.log import duration, read_log
from plumbing.plots import COLOURS, new_figure, save_figure
from plumbing.script import UserError, counted, run_script

# All that a budget fixes. `common`, `pretrain`, `finetune` are flags of the scripts; the others:
#   recipes: the settings of fine-tuning that --tune tries, for every arm alike; the first is taken without tuning;
#   labels: images per class: epochs of fine-tuning, for as many steps as the budget's usual ones;
#   images, val_images, classes: of the data set; measure_images: of claims 3 and 9;
#   speed: images per second that --dry_run assumes until jobs have finished, for one core or one GPU.
BUDGETS = {
    "laptop": dict(
        about="embedded pictures, ConvNeXt Atto, two cores without a GPU",
        seeds=3, size="atto", images=4000, val_images=1000, classes=10, measure_images=1000,
        common=dict(data_set="embedded", input_size=32, stem_stride=1),
        pretrain=dict(epochs=16, batch_size=32, lr=1e-3, decoder_embed_dim=256),
        finetune=dict(epochs=40, batch_size=20, head_init_scale=1, labels_per_class=20),
        recipes={
            "plain_1e-3": dict(lr=1e-3),
            "plain_5e-4": dict(lr=5e-4),
            "jittered_1e-3": dict(lr=1e-3, color_jitter=0.4),
            "mixed_1e-3": dict(lr=1e-3, mixup=0.8, cutmix=1, color_jitter=0.4),
        },
        labels={5: 200, 100: 8, 400: 2},
        mask_ratios=(0.1, 0.35, 0.6, 0.85),  # the ends of the range that the paper tries, and two between
        decoder_depths=(1, 2, 4), decoder_widths=(128, 256, 512),
        speed=dict(pretrain=65, finetune=36, analyze=50),
    ),
    "gpu": dict(
        about="CIFAR-10 at 32 x 32, ConvNeXt Atto, one GPU; these settings have not been run",
        seeds=3, size="atto", images=50_000, val_images=10_000, classes=10, measure_images=1000,
        common=dict(data_set="cifar10", input_size=32, stem_stride=1, batch_size=256, num_workers=8),
        pretrain=dict(epochs=10, blr=2e-3, decoder_embed_dim=256),
        finetune=dict(epochs=5, aa="none", reprob=0.0),  # crops and flips alone, so that the data are held on the GPU
        recipes={f"blr_{blr:g}": dict(blr=blr) for blr in (2e-3, 5e-4, 8e-3)},
        labels={5: 975, 20: 975, 100: 325, 500: 51},
        mask_ratios=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
        decoder_depths=(1, 2, 4), decoder_widths=(128, 256, 512),
        speed=dict(pretrain=10_000, finetune=10_000, analyze=10_000),
    ),
}  # fmt: skip
BASELINE = dict(mask_ratio=0.6, decoder="convnext", decoder_depth=1, backend="sparse", mlp_norm="grn")
COST = {"masked": 3.5, "leaky": 2.4}  # of an image, relative to the sparse encoder
HOLDOUT = 0.2  # share of the training images on which --tune compares


# --- jobs -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One run of a script. Its name says all that makes it different from other jobs of the budget."""

    name: str
    script: str
    directory: Path
    argv: tuple[str, ...]
    output: str  # the file that it is run for
    needs: tuple["Job", ...] = ()
    work: float = 0.0  # images, forward and back, in units of the script's usual cost

    @property
    def file(self) -> str:
        """Where the output is."""
        return str(self.directory / self.output)

    @property
    def record(self) -> dict:
        """What is known of the run: flags, seconds, commit, hardware, versions; empty before it is started."""
        path = self.directory / "job.json"
        return json.loads(path.read_text()) if path.exists() else {}

    @property
    def stale(self) -> bool:
        """Whether it, or what it needs, was run with other flags, as after a change of `BUDGETS`."""
        return bool(self.record) and (self.record["argv"] != list(self.argv) or any(need.stale for need in self.needs))

    @property
    def finished(self) -> bool:
        """Whether it has run to its end, with these flags."""
        return self.record.get("finished", False) and not self.stale and Path(self.file).exists()

    @property
    def command(self) -> str:
        """What to type to run it alone."""
        return f"python {self.script}.py {shlex.join(self.argv)}"

    def with_needs(self) -> Iterator["Job"]:
        """The job after everything that it needs."""
        for need in self.needs:
            yield from need.with_needs()
        yield self


class Plan:
    """Makes the jobs of a budget. Equal settings give equal jobs, so that claims share them."""

    def __init__(self, budget: dict, root: Path, chosen: dict[str, str]):
        self.budget, self.root, self.chosen = budget, root, chosen

    def recipe(self, name: str) -> str:
        """The recipe of fine-tuning that an arm takes: the tuned one, or the budget's first."""
        return self.chosen.get(name, next(iter(self.budget["recipes"])))

    def pretrain(self, seed: int, version: str = "V2", **changes) -> Job:
        """Pre-training, with what differs from `BASELINE`."""
        budget = self.budget
        base = BASELINE | dict(decoder_embed_dim=budget["pretrain"]["decoder_embed_dim"])
        changes = {name: value for name, value in changes.items() if value != base[name]}
        flags = budget["common"] | budget["pretrain"] | changes
        work = flags["epochs"] * budget["images"] * COST.get(changes.get("backend"), 1.0)
        return self._job("pretrain", ["pretrain", version, *_words(changes)], seed, "encoder.pth", flags, version, work=work)

    def finetune(self, seed: int, start: Job | str, recipe: str | None = None, labels: int | None = None, **changes) -> Job:
        """Fine-tuning of a pre-training job's encoder, or from random weights: `start` is then "V1" or "V2"."""
        budget, scratch = self.budget, isinstance(start, str)
        version = start if scratch else start.name.split("-")[1]
        recipe = recipe or self.recipe(arm(version, scratch))
        flags = budget["common"] | budget["finetune"] | budget["recipes"][recipe] | changes
        if labels:
            flags |= dict(labels_per_class=labels, epochs=budget["labels"][labels])
        few = flags.get("labels_per_class")
        images = few * budget["classes"] if few else budget["images"] * (1 - changes.get("holdout", 0))
        flags |= dict(scratch="true") if scratch else dict(finetune=start.file)
        flags["eval_freq"] = flags["epochs"]  # one evaluation, at the end: nothing is chosen by it
        name = ["scratch", version] if scratch else ["finetune", *start.name.split("-")[1:-1]]
        name += _words({f"then_{key}": value for key, value in changes.items()} | dict(labels=labels, recipe=recipe))
        work = flags["epochs"] * images + budget["val_images"] / 3
        needs = () if scratch else (start,)
        return self._job("finetune", name, seed, "checkpoint-best.pth", flags, version, needs, work)

    def analyze(self, seed: int, command: str, subjects: dict[str, Job]) -> Job:
        """A command of analyze.py on the outputs of several jobs, under the names that are the keys."""
        budget = self.budget
        directory = self.root / f"{command}-seed{seed}"
        argv = [command, "--checkpoint", *(job.file for job in subjects.values()), "--label", *subjects]
        argv += ["--num_images", str(budget["measure_images"]), "--output_dir", str(directory)]
        work = budget["measure_images"] * len(subjects)
        needs = tuple(subjects.values())
        return Job(directory.name, "analyze", directory, tuple(argv), f"{command}.csv", needs, work)

    def _job(self, script, name, seed, output, flags, version, needs=(), work=0.0) -> Job:
        directory = self.root / "-".join([*name, f"seed{seed}"])
        if "data_path" in flags:
            flags = flags | dict(data_path=self.root / flags["data_path"])
        model = f"convnext{'v2' if version == 'V2' else ''}_{self.budget['size']}"
        flags = dict(model=model) | flags | dict(seed=seed, output_dir=directory)
        flags |= dict(save_ckpt_freq=max(1, flags["epochs"] // 10), save_ckpt_num=1)
        return Job(directory.name, script, directory, tuple(_flags(flags)), output, needs, work)


def arm(version: str, scratch: bool) -> str:
    """What has a recipe of its own."""
    return f"{version} {'supervised' if scratch else 'FCMAE'}"


def arms(plan: Plan, seed: int) -> dict[str, Job | str]:
    """Where fine-tuning starts from in each arm: random weights, or an encoder pre-trained with this seed."""
    kinds = product(("V1", "V2"), (True, False))
    return {arm(version, scratch): version if scratch else plan.pretrain(seed, version) for version, scratch in kinds}


def _flags(settings: dict) -> list[str]:
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def _words(changes: dict) -> list[str]:
    return [f"{name}_{value}" for name, value in changes.items() if value is not None]


def tuning_jobs(plan: Plan) -> dict[tuple[str, str], Job]:
    """The same recipes for each of the four arms, on one seed, without the held-out images."""
    tried = product(arms(plan, 0).items(), plan.budget["recipes"])
    return {(name, recipe): plan.finetune(0, start, recipe, holdout=HOLDOUT) for (name, start), recipe in tried}


# --- claims -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Expectation:
    """That a weighted sum of cells' means is above zero, or, for a `tie`, that it does not differ from zero."""

    text: str
    weights: dict[str, float]
    tie: bool = False


@dataclass(frozen=True)
class Claim:
    """A claim of the paper: a job for every cell and seed, a number from it, and what the paper leads one to expect."""

    title: str
    jobs: Callable[[Plan, int], dict[str, Job]]
    expect: Callable[[list[str]], list[Expectation]]
    paper: dict[str, object]
    quantity: str = "top-1, %"
    value: Callable[[Job, str], float] = lambda job, cell: top1(job)
    note: str = ""
    x: str = ""  # of the figure, whose points are the cells
    series: Callable[[str], tuple[str, float]] | None = field(default=None)  # a cell's line in the figure, and its x


def top1(job: Job) -> float:
    """Of the last epoch, in percent."""
    return [record["val_top1"] for record in read_log(job.directory) if "val_top1" in record][-1]


def rows_of(job: Job, cell: str) -> list[dict]:
    """What analyze.py wrote about one network, V2 after GRN."""
    with open(job.file, newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["checkpoint"] == cell]
    return [row for row in rows if row.get("tensor") == "after GRN"] or rows


def mean_distance(job: Job, cell: str) -> float:
    """Feature cosine distance, mean over layers."""
    return statistics.fmean(float(row["cosine_distance_mean"]) for row in rows_of(job, cell))


def deep_selectivity(job: Job, cell: str) -> float:
    """Class selectivity index, mean over the channels of the last third of the blocks."""
    rows = rows_of(job, cell)
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    deep = set(layers[-(len(layers) // 3) :])
    values = [float(row["class_selectivity_index"]) for row in rows if row["layer"] in deep]
    return statistics.fmean(value for value in values if not math.isnan(value))


def finetuned(plan: Plan, seed: int, variants: dict[str, dict]) -> dict[str, Job]:
    """Pre-trained with each variant's flags and fine-tuned alike."""
    return {cell: plan.finetune(seed, plan.pretrain(seed, **flags)) for cell, flags in variants.items()}


def four_cells(plan: Plan, seed: int) -> dict[str, Job]:
    """V1 and V2, supervised and with FCMAE; supervised training takes the fine-tuning's steps."""
    return {cell: plan.finetune(seed, start) for cell, start in arms(plan, seed).items()}


def studied(plan: Plan, seed: int) -> dict[str, Job]:
    """Encoders as pre-trained, and the V1 classifier trained from random weights."""
    supervised = plan.finetune(seed, "V1")
    return {"V1 FCMAE": plan.pretrain(seed, "V1"), "V1 supervised": supervised, "V2 FCMAE": plan.pretrain(seed)}


def collapse_jobs(plan: Plan, seed: int) -> dict[str, Job]:
    """Claim 3: one job measures all of the networks."""
    subjects = studied(plan, seed)
    return dict.fromkeys(subjects, plan.analyze(seed, "collapse", subjects))


def selectivity_jobs(plan: Plan, seed: int) -> dict[str, Job]:
    """Claim 9: one job measures both pre-trained encoders."""
    subjects = {cell: job for cell, job in studied(plan, seed).items() if "FCMAE" in cell}
    return dict.fromkeys(subjects, plan.analyze(seed, "selectivity", subjects))


def grn_jobs(plan: Plan, seed: int) -> dict[str, Job]:
    """Claim 6: GRN in pre-training, in fine-tuning, or in both."""
    with_grn, without = plan.pretrain(seed), plan.pretrain(seed, mlp_norm="none")
    return {
        "in both stages": plan.finetune(seed, with_grn),
        "dropped at fine-tuning": plan.finetune(seed, with_grn, mlp_norm="none"),
        "added at fine-tuning": plan.finetune(seed, without, mlp_norm="grn"),
    }


def decoder_jobs(plan: Plan, seed: int) -> dict[str, Job]:
    """Claim 7: fine-tuning after pre-training with each decoder."""
    variants = {"one ConvNeXt block": {}}
    variants |= {cell: dict(decoder=name) for cell, name in DECODER_CELLS.items()}
    variants |= {f"depth {depth}": dict(decoder_depth=depth) for depth in plan.budget["decoder_depths"] if depth > 1}
    usual = plan.budget["pretrain"]["decoder_embed_dim"]
    variants |= {f"width {width}": dict(decoder_embed_dim=width) for width in plan.budget["decoder_widths"] if width != usual}
    return finetuned(plan, seed, variants)


def mask_jobs(plan: Plan, seed: int) -> dict[str, Job]:
    """Claim 8: fine-tuning after pre-training with each mask ratio."""
    return finetuned(plan, seed, {f"{ratio:.0%} hidden": dict(mask_ratio=ratio) for ratio in plan.budget["mask_ratios"]})


def label_jobs(plan: Plan, seed: int) -> dict[str, Job]:
    """Fine-tuning on each number of labels per class, with and without pre-training."""
    starts = {"FCMAE": plan.pretrain(seed), "supervised": "V2"}
    usual = plan.budget["finetune"].get("labels_per_class", plan.budget["images"] // plan.budget["classes"])
    return {
        f"{name}, {count} per class": plan.finetune(seed, start, labels=None if count == usual else count)
        for count in sorted({*plan.budget["labels"], usual})
        for name, start in starts.items()
    }


def above(best: str, others: Iterable[str]) -> list[Expectation]:
    """That one cell is above each of the others."""
    return [Expectation(f"{best} above {other}", {best: 1, other: -1}) for other in others]


def ties(first: str, others: Iterable[str]) -> list[Expectation]:
    """That `first` differs from none of the others."""
    return [Expectation(f"{first} as {other}", {first: 1, other: -1}, tie=True) for other in others]


def expect_middle_ratios(cells: list[str]) -> list[Expectation]:
    """That the mean of 50 to 70% is above the means of the lower and of the higher ratios."""
    ratio = {cell: int(cell.split("%")[0]) for cell in cells}
    middle = [cell for cell in cells if 50 <= ratio[cell] <= 70]
    found = []
    for words, side in (("lower", [c for c in cells if ratio[c] < 50]), ("higher", [c for c in cells if ratio[c] > 70])):
        if side:
            mean = dict.fromkeys(middle, 1 / len(middle)) | dict.fromkeys(side, -1 / len(side))
            found.append(Expectation(f"50 to 70% above the {words} ratios", mean))
    return found


def expect_fewer_labels(cells: list[str]) -> list[Expectation]:
    """That FCMAE is above supervised at each number of labels."""
    return [
        Expectation(f"FCMAE above supervised at {cell.split(', ')[1]}", {cell: 1, cell.replace("FCMAE", "supervised"): -1})
        for cell in cells
        if cell.startswith("FCMAE")
    ]


NORM_CELLS = {"GRN": "grn", "nothing (V2 without GRN)": "none", "LRN": "lrn", "BN": "bn", "LN": "ln", "SE": "se", "CBAM": "cbam"}
GRN_CELLS = {"GRN": "grn", "average": "grn_average", "L1": "grn_l1", "standardised": "grn_standardise"}
GRN_CELLS |= {"inverse sum": "grn_inverse", "no skip": "grn_no_skip"}
DECODER_CELLS = {"U-Net with skip": "unet_skip", "U-Net without": "unet", "transformer": "transformer"}


def norm_jobs(cells: dict[str, str]) -> Callable[[Plan, int], dict[str, Job]]:
    """Claims 4 and 5: fine-tuning after pre-training, with each of `cells` in GRN's place in both."""
    return lambda plan, seed: finetuned(plan, seed, {cell: dict(mlp_norm=name) for cell, name in cells.items()})


# The paper's numbers are those of ConvNeXt-Base on ImageNet-1K, top-1 after fine-tuning.
CLAIMS = {
    "1": Claim(
        "Sparse encoding: masks inside the encoder, not only before it",
        lambda plan, seed: finetuned(plan, seed, {name: dict(backend=name) for name in ("sparse", "masked", "leaky")}),
        lambda cells: above("sparse", ["leaky"]) + ties("sparse", ["masked"]),
        {"sparse": 83.7, "leaky": 79.3},
        note="Masked: the sparse encoder's function by dense convolutions. Leaky: no masks inside.",
    ),
    "2": Claim(
        "Co-design: architecture and pre-training together",
        four_cells,
        lambda cells: [
            *above("V2 FCMAE", ["V2 supervised", "V1 FCMAE"]),
            Expectation(
                "FCMAE does more for V2 than for V1",
                {"V2 FCMAE": 1, "V2 supervised": -1, "V1 FCMAE": -1, "V1 supervised": 1},
            ),
        ],
        {"V1 supervised": 83.8, "V1 FCMAE": 83.7, "V2 supervised": 84.3, "V2 FCMAE": 84.6},
        note="Supervised cells have the steps of fine-tuning; the FCMAE cells' pre-training comes on top of them, without labels.",
        x="",
        series=lambda cell: (cell.split()[0], float(cell.endswith("FCMAE"))),
    ),
    "3": Claim(
        "Feature collapse of V1 under FCMAE",
        collapse_jobs,
        lambda cells: above("V2 FCMAE", ["V1 FCMAE"]) + above("V1 supervised", ["V1 FCMAE"]),
        {},
        quantity="feature cosine distance, mean over layers",
        value=mean_distance,
        note="4C-wide features, V2's after GRN. In the paper's Fig. 4 V1 FCMAE falls low, V1 supervised only in the last layers.",
    ),
    "4": Claim(
        "GRN's parts: aggregation, normalisation, skip",
        norm_jobs(GRN_CELLS),
        lambda cells: above("GRN", [cell for cell in cells if cell not in ("GRN", "standardised")]) + ties("GRN", ["standardised"]),
        {"GRN": 84.6, "average": 83.7, "L1": 84.3, "standardised": 84.5, "inverse sum": 83.8, "no skip": 84.0},
    ),
    "5": Claim(
        "What stands in GRN's place",
        lambda plan, seed: (
            norm_jobs(NORM_CELLS)(plan, seed) | {"nothing (V1, LayerScale)": plan.finetune(seed, plan.pretrain(seed, "V1"))}
        ),
        lambda cells: above("GRN", [cell for cell in cells if cell not in ("GRN", "SE", "CBAM")]) + ties("GRN", ["SE", "CBAM"]),
        {"GRN": 84.6, "nothing (V1, LayerScale)": 83.7, "LRN": 83.2, "BN": 80.5, "LN": 83.8, "SE": 84.4, "CBAM": 84.5},
        note="CBAM here weighs a site by itself, without the 7x7 neighbourhood (ablations/norms.py).",
    ),
    "6": Claim(
        "GRN is needed in both stages",
        grn_jobs,
        lambda cells: above("in both stages", ["dropped at fine-tuning", "added at fine-tuning"]),
        {"in both stages": 84.6, "dropped at fine-tuning": 78.8, "added at fine-tuning": 80.6},
        note="Without GRN a V2 block has no LayerScale either.",
    ),
    "7": Claim(
        "A plain decoder is enough",
        decoder_jobs,
        lambda cells: ties(cells[0], cells[1:]),
        {"one ConvNeXt block": 83.7, "U-Net with skip": 83.7, "U-Net without": 83.5, "transformer": 83.4}
        | {"depth 2": 83.5, "depth 4": 83.7, "width 128": 83.5, "width 256": 83.7, "width 512": 83.7},
        note="The minutes of pre-training tell the decoders apart: 12.9, 12.9, 8.5 and 7.7 hours in the paper for U-Net with and "
        "without skip, transformer, and one ConvNeXt block.",
    ),
    "8": Claim(
        "Mask ratio: half to two thirds hidden is best",
        mask_jobs,
        expect_middle_ratios,
        {},
        note="The paper finds 50 to 70% good and 60% best, in a figure.",
        x="share of the patches hidden, %",
        series=lambda cell: ("V2 FCMAE", float(cell.split("%")[0])),
    ),
    "9": Claim(
        "Class selectivity: V2's deep channels are more class-generic than V1's",
        selectivity_jobs,
        lambda cells: above("V1 FCMAE", ["V2 FCMAE"]),
        {},
        quantity="class selectivity index, mean over the last third of the blocks",
        value=deep_selectivity,
        note="Encoders as pre-trained. The paper shows histograms.",
    ),
    "labels": Claim(
        "Accuracy against labels: what pre-training saves",
        label_jobs,
        expect_fewer_labels,
        {},
        note="Not an experiment of the paper. The same images, chosen by the seed, with and without pre-training; the same number of "
        "steps for every number of labels, so that of many labels each is seen a few times only.",
        x="labelled images per class",
        series=lambda cell: (cell.split(", ")[0], float(cell.split()[1])),
    ),
}


# --- running ----------------------------------------------------------------------------------------------------------


def unique(jobs: Iterable[Job]) -> list[Job]:
    """Every job once, after those that it needs."""
    return list(dict.fromkeys(part for job in jobs for part in job.with_needs()))


def circumstances(threads: int) -> dict:
    """What a number depends on besides its command."""
    describe = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude", "*"]
    git = subprocess.run(describe, capture_output=True, text=True)
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), cpu)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{threads} of {os.cpu_count()} cores of {cpu}"
    return {"commit": git.stdout.strip() or "unknown", "hardware": device, "versions": versions()}


class Running:
    """A job under way: keeps job.json, whatever way it ends."""

    def __init__(self, job: Job, threads: int):
        self.job, self.start, self.before = job, time.perf_counter(), job.record.get("seconds", 0.0)
        prepare_output_dir(str(job.directory))
        self.record = dict(script=job.script, argv=list(job.argv), seconds=self.before, finished=False) | circumstances(threads)
        self.end(False)

    def end(self, finished: bool) -> None:
        """Note the time; what serves only for resuming goes once the job has finished."""
        self.record |= dict(seconds=round(self.before + time.perf_counter() - self.start, 1), finished=finished)
        save_json(self.job.directory / "job.json", self.record)
        for path in find_checkpoints(self.job.directory) if finished else ():
            path.unlink()


def run_here(job: Job, threads: int) -> None:
    """Run a job in this process; what it prints goes to output.txt."""
    script = importlib.import_module(job.script)
    running, finished = Running(job, threads), False
    try:
        with open(job.directory / "output.txt", "a") as file, contextlib.redirect_stdout(file):
            script.main(script.get_args(list(job.argv)))
        finished = True
    finally:
        running.end(finished)


def start_beside(job: Job, threads: int) -> tuple[Running, subprocess.Popen]:
    """Start a job in a process of its own, on so many threads."""
    running = Running(job, threads)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    command = [sys.executable, str(Path(__file__).parent / f"{job.script}.py"), *job.argv]
    with open(job.directory / "output.txt", "a") as file:
        return running, subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)


def run_all(jobs: list[Job], side_by_side: int) -> None:
    """Run what has not finished, `side_by_side` at a time; UserError at the end if some failed."""
    if stale := [job for job in jobs if job.stale]:
        differing = shlex.join(sorted(set(stale[0].record["argv"]) ^ set(stale[0].argv)))
        raise UserError(
            f"{counted(len(stale), 'job')}, {stale[0].directory} for one, ran with other flags ({differing} differ); delete them, or "
            f"choose another --output_dir"
        )
    waiting = [job for job in jobs if not job.finished]
    done, failed, started = len(jobs) - len(waiting), {}, {}
    threads = max(1, torch.get_num_threads() // side_by_side) if side_by_side > 1 else torch.get_num_threads()
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # end the running jobs too; they continue when started again

    def close(job, error=None):
        nonlocal done
        if error:
            failed[job] = error
            line = f"{job.name} failed: {error}"
        else:
            done += 1
            result = f"top-1 {top1(job):.2f}%, " if job.script == "finetune" else ""
            line = f"[{done}/{len(jobs)}] {job.name}: {result}{duration(job.record['seconds'])}"
        print(line, flush=True)

    try:
        while waiting or started:
            for job in [job for job in waiting if any(need in failed for need in job.needs)]:
                waiting.remove(job)
                close(job, "a job that it needs has failed")
            ready = [job for job in waiting if all(need.finished for need in job.needs)]
            for job in ready[: side_by_side - len(started)]:
                waiting.remove(job)
                if side_by_side > 1:
                    started[job] = start_beside(job, threads)
                    continue
                try:
                    run_here(job, threads)
                    close(job)
                except (UserError, SystemExit) as error:
                    close(job, str(error))
            time.sleep(0.2 if started else 0)
            for job, (running, process) in list(started.items()):
                if process.poll() is not None:
                    del started[job]
                    running.end(process.returncode == 0)
                    close(job, process.returncode and f"see {job.directory / 'output.txt'}")
    finally:
        for running, process in started.values():
            process.terminate()
            process.wait()
            running.end(False)
        signal.signal(signal.SIGTERM, before)
    if failed:
        names = ", ".join(job.name for job in failed)
        raise UserError(
            f"{counted(len(failed), 'job')} failed ({names}); the others are done, and the same command tries these again"
        )


def show(jobs: list[Job], speed: dict[str, float], side_by_side: int) -> None:
    """List the jobs and what they take: as measured, or by the speed of finished ones, or by the budget's."""
    finished = {job for job in jobs if job.finished}
    left = 0.0
    for job in jobs:
        alike = [other for other in finished if other.script == job.script]
        rate = sum(other.work for other in alike) / sum(other.record["seconds"] for other in alike) if alike else speed[job.script]
        seconds = job.record["seconds"] if job in finished else job.work / rate
        left += 0 if job in finished else seconds
        state = "finished" if job in finished else "stale" if job.stale else "begun" if job.record else "to do"
        print(f"{state:8}  {seconds / 60:7.1f} min  {job.name}")
    scripts = {job.script: sum(other.script == job.script for other in jobs) for job in jobs}
    counts = ", ".join(f"{count} of {script}.py" for script, count in scripts.items())
    print(f"{counted(len(jobs), 'job')} ({counts}), {len(finished)} finished; about {duration(left)} on one core or GPU are left,")
    print(f"{duration(left / side_by_side)} with --jobs {side_by_side}. " + ", ".join(f"{k} {v} images/s" for k, v in speed.items())
          + " assumed where no job has finished")  # fmt: skip


# --- results ----------------------------------------------------------------------------------------------------------

# Student's t, 97.5%, by degrees of freedom from 1 to 10; more take the last, which is a little too strict.
T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)

PROTOCOL = Path(__file__).parent / "results" / "protocol.md"  # what {stands in braces} is filled in


def contrast(values: dict[str, list[float]], weights: dict[str, float]) -> tuple[float, float]:
    """A weighted sum of cells' means, and its margin: infinite without two seeds of any cell."""
    cells = [values[cell] for cell in weights]
    estimate = sum(weight * statistics.fmean(cell) for weight, cell in zip(weights.values(), cells))
    freedom = sum(len(cell) - 1 for cell in cells)
    if not freedom:
        return estimate, math.inf
    variance = sum((len(cell) - 1) * statistics.variance(cell) for cell in cells if len(cell) > 1) / freedom
    error = math.sqrt(variance * sum(weight**2 / len(cell) for weight, cell in zip(weights.values(), cells)))
    return estimate, T[min(freedom, len(T)) - 1] * error


def judge(expectations: list[Expectation], values: dict[str, list[float]]) -> tuple[str, list[str]]:
    """The verdict, and a line for every expectation. Expectations about cells without a number are left out."""
    lines, outcomes = [], []
    for expectation in expectations:
        if not all(values.get(cell) for cell in expectation.weights):
            continue
        estimate, margin = contrast(values, expectation.weights)
        if expectation.tie:
            outcome = "open" if margin == math.inf else "holds" if abs(estimate) <= margin else "contradicted"
        else:
            outcome = "holds" if estimate > margin else "contradicted" if estimate < -margin else "open"
        outcomes.append(outcome)
        words = {"holds": "yes", "contradicted": "no", "open": "not distinguishable"}[outcome]
        shown = "unknown: it takes two seeds" if margin == math.inf else f"{margin:.3g}"
        lines.append(f"{expectation.text}: {words} (difference {estimate:+.3g}, margin {shown})")
    if "contradicted" in outcomes:
        return "not reproduced", lines
    complete = len(outcomes) == len(expectations)
    return "reproduced" if complete and set(outcomes) == {"holds"} else "not distinguishable at this scale", lines


def gather(claim: Claim, plan: Plan, seeds: int) -> dict[str, list[Job]]:
    """The finished jobs of each cell."""
    jobs = {}
    for seed in range(seeds):
        for cell, job in claim.jobs(plan, seed).items():
            jobs.setdefault(cell, []).extend([job] if job.finished else [])
    return jobs


def fuller_table(own: list[dict], path: Path, claim: Claim, plan: Plan) -> list[dict]:
    """Our own rows, or those that are at `path` already, if more runs of the same settings stand behind them: never a mixture."""
    if not path.exists():
        return own
    commands = {cell: _command([job]) for cell, job in claim.jobs(plan, 0).items()}
    with open(path, newline="") as file:
        earlier = [_typed(row) | {"paper": claim.paper.get(row["cell"])} for row in csv.DictReader(file)]
    earlier = [row for row in earlier if _settings(row["command"]) == _settings(commands.get(row["cell"], ""))]
    return max(own, earlier, key=lambda rows: sum(row["n"] for row in rows))


def _typed(row: dict[str, str]) -> dict:
    numbers = ("mean", "std", "pretrain_minutes", "finetune_minutes")
    return row | {key: float(row[key]) if row[key] else None for key in numbers} | {"n": int(row["n"])}


def _settings(command: str) -> list[str]:
    """A command's words without the folders of its files, and without --amp, which changes rounding only."""
    return [Path(word).name for word in shlex.split(re.sub(r" --amp \w+", "", command))]


def _command(jobs: Iterable[Job]) -> str:
    return " && ".join(job.command for job in unique(jobs))


def table_of(claim: Claim, jobs: dict[str, list[Job]]) -> list[dict]:
    """A row per cell with finished jobs: the number, and everything that belongs to it."""
    rows = []
    for cell, done in jobs.items():
        if not done:
            continue
        values = [float(f"{claim.value(job, cell):.6g}") for job in done]  # as they are written
        minutes = {script: [job.record["seconds"] / 60 for last in done for job in unique([last]) if job.script == script]
                   for script in ("pretrain", "finetune")}  # fmt: skip
        known = [job.record for last in done for job in unique([last])]
        rows.append(
            {"cell": cell, "quantity": claim.quantity, "mean": statistics.fmean(values)}
            | {"std": statistics.stdev(values) if len(done) > 1 else None, "n": len(done)}
            | {"values": " ".join(f"{value:.6g}" for value in values), "paper": claim.paper.get(cell)}
            | {f"{script}_minutes": statistics.fmean(times or [0.0]) for script, times in minutes.items()}
            | {"command": _command(done[:1])}
            | {key: "; ".join(dict.fromkeys(record[key] for record in known)) for key in ("commit", "hardware")}
            | {"versions": ", ".join(f"{name} {version}" for name, version in known[-1]["versions"].items())}
        )
    return rows


def markdown_of(claim: Claim, rows: list[dict]) -> list[str]:
    """The table as Markdown."""
    digits = 1 if "%" in claim.quantity else 4
    lines = [f"| | {claim.quantity} | n | the paper's | pre-training | fine-tuning |", "|---|---|---|---|---|---|"]
    for row in rows:
        number = f"{row['mean']:.{digits}f}" + ("" if row["std"] is None else f" ± {row['std']:.{digits}f}")
        minutes = " | ".join(f"{row[f'{script}_minutes']:.1f} min" for script in ("pretrain", "finetune"))
        lines.append(f"| {row['cell']} | {number} | {row['n']} | {row['paper'] or ''} | {minutes} |")
    return lines


def draw(claim: Claim, rows: list[dict], path: Path) -> None:
    """Means with one standard deviation over seeds, and every seed as a point."""
    figure, axes = new_figure(1, 1, 6, 4.2)
    axis, lines = axes[0, 0], {}
    for row in rows:
        name, x = claim.series(row["cell"])
        lines.setdefault(name, []).append((x, row["mean"], row["std"] or 0.0, [float(value) for value in row["values"].split()]))
    ticks = sorted({x for points in lines.values() for x, *_ in points})
    log = "labelled" in claim.x
    for k, (name, points) in enumerate(lines.items()):
        x, mean, std, seeds = zip(*sorted(points))
        for place, values in zip(_bars(axis, x, mean, std, name, k, len(lines), log), seeds):
            axis.scatter([place] * len(values), values, color=COLOURS[k], s=16, alpha=0.5, linewidth=0)
    if not claim.x:
        axis.set_xticks([0, 1], ["supervised", "FCMAE, then fine-tuned"])
        axis.set_xlim(-0.3, 1.3)
    else:
        axis.set_xscale("log" if log else "linear")
        axis.set_xticks(ticks, [f"{x:g}" for x in ticks])
        axis.minorticks_off()
    axis.set_ylabel(claim.quantity.replace(", %", " accuracy, %"), fontsize=12)
    _finish(figure, axis, claim, rows, path, len(lines) > 1)


def draw_collapse(claim: Claim, jobs: dict[str, list[Job]], rows: list[dict], path: Path) -> None:
    """Feature cosine distance against depth, mean and standard deviation over seeds."""
    figure, axes = new_figure(1, 1, 6, 4.2)
    axis = axes[0, 0]
    done = {cell: [rows_of(job, cell) for job in found] for cell, found in jobs.items() if found}
    for k, (cell, tables) in enumerate(done.items()):
        x = [float(row["normalised_index"]) for row in tables[0]]
        layers = list(zip(*([float(row["cosine_distance_mean"]) for row in table] for table in tables)))  # of each, all seeds
        std = [statistics.stdev(layer) if len(layer) > 1 else 0.0 for layer in layers]
        _bars(axis, x, [statistics.fmean(layer) for layer in layers], std, cell, k, len(done))
    axis.set_ylabel("feature cosine distance\n(0: all channels alike, 0.5: orthogonal)", fontsize=12)
    axis.set_xlabel("normalised layer index", fontsize=12)
    _finish(figure, axis, claim, rows, path, True)


def _bars(axis, x, mean, std, label, k, lines, log=False):
    """The k-th of several lines with bars of one deviation, a little aside so that none hides another; the places."""
    aside = 0.015 * (k - (lines - 1) / 2)  # of the axis
    x = [place * (x[-1] / x[0]) ** aside if log else place + (x[-1] - x[0]) * aside for place in x]
    style = dict(marker="o", markersize=5, linewidth=2, elinewidth=1.2, capsize=3)
    axis.errorbar(x, mean, std, color=COLOURS[k], label=label, **style)
    return x


def _finish(figure, axis, claim, rows, path, legend):
    if claim.x:
        axis.set_xlabel(claim.x, fontsize=12)
    n = sorted({row["n"] for row in rows})
    seeds = f"{' to '.join(map(str, n))} seed{'s' if n[-1] > 1 else ''}"
    axis.set_title(f"{claim.title.split(':')[0]}\nmean and standard deviation of {seeds}", fontsize=12)
    axis.grid(alpha=0.3)
    if legend:
        axis.legend(fontsize=11)
    save_figure(figure, path)


def write_results(budget_name: str, plan: Plan, seeds: int, results: Path) -> None:
    """README.md, a CSV per claim, and figures, from all jobs that have finished."""
    prepare_output_dir(str(results))
    budget, sections, summary, missing = plan.budget, [], [], []
    for name, claim in CLAIMS.items():
        jobs, path = gather(claim, plan, seeds), results / f"claim_{name}.csv"
        own = table_of(claim, jobs)
        rows = fuller_table(own, path, claim, plan)
        values = {row["cell"]: [float(value) for value in row["values"].split()] for row in rows}
        verdict, lines = judge(claim.expect(list(jobs)), values)
        if not lines:  # nothing to compare yet
            missing.append(f"{name} ({claim.title})")
            continue
        save_csv(path, rows)
        incomplete = [cell for cell in jobs if len(values.get(cell, ())) < seeds]
        verdict += ", so far" if incomplete else ""
        heading = f"{'Claim ' if name != 'labels' else ''}{name}. {claim.title}"
        summary.append(f"| {name} | {claim.title} | {verdict} |")
        sections += ["", f"## {heading}", "", f"**{verdict[0].upper()}{verdict[1:]}.** {claim.note}", ""]
        flag = "" if budget_name == "laptop" else f" --budget {budget_name}"
        sections += [f"    python reproduce.py{flag} --claim {name}", ""]
        sections += [*markdown_of(claim, rows), "", *(f"* {line}" for line in lines)]
        if incomplete:
            sections += [f"* Fewer than {seeds} seeds have finished of: {', '.join(incomplete)}"]
        chance = 100 / plan.budget["classes"]
        near = {cell: [f"{value:.1f}" for value in values[cell] if value < 1.5 * chance] for cell in values}
        if claim.quantity.startswith("top-1") and any(near.values()):
            listed = "; ".join(f"{cell} ({', '.join(found)})" for cell, found in near.items() if found)
            sections += [f"* Runs below one and a half times chance ({chance:.0f}%), which hardly learned: {listed}"]
        picture = results / f"claim_{name}.png"
        if name == "3":
            if rows is own:  # it shows what the table does not hold
                draw_collapse(claim, jobs, rows, picture)
        elif claim.series:
            draw(claim, rows, picture)
        if picture.exists():
            sections += ["", f"![{claim.title}]({picture.name})"]
        sections += ["", f"Commands, commit, hardware and versions of every number: [claim_{name}.csv](claim_{name}.csv)."]

    tuned = ", ".join(f"{name} `{recipe}`" for name, recipe in plan.chosen.items())
    protocol = PROTOCOL.read_text().format(
        recipes="; ".join(f"`{name}`: {shlex.join(_flags(flags))}" for name, flags in budget["recipes"].items()),
        holdout=HOLDOUT,
        tuned=f"Chosen: {tuned} ([tuning.csv](tuning.csv))." if tuned else f"Not done here: all take `{plan.recipe('')}`.",
        pretrain_epochs=budget["pretrain"]["epochs"],
        images=budget["images"],
        finetune_epochs=budget["finetune"]["epochs"],
        finetune_images=budget["finetune"].get("labels_per_class", budget["images"] // budget["classes"]) * budget["classes"],
        t=T[3],
    )
    head = [f"# The paper's claims at the {budget_name} budget", "", "Written by `reproduce.py`; do not edit.", ""]
    head += [f"Budget: {budget['about']}."]
    head += ["The paper's own numbers are of ConvNeXt-Base on ImageNet-1K, and stand beside ours for their direction.", ""]
    head += ["| | claim | verdict |", "|---|---|---|", *summary, ""]
    head += [f"Not run: {'; '.join(missing)}." if missing else "All claims were run.", "", "## Protocol", "", protocol.rstrip()]
    text = "\n".join([*head, *sections]) + "\n"
    write_atomically(results / "README.md", lambda file: file.write_text(text))
    print(f"wrote {results / 'README.md'}, with {len(summary)} of {len(CLAIMS)} claims")


def write_tuning(jobs: dict[tuple[str, str], Job], path: Path) -> None:
    """The held-out accuracy of every arm and recipe, and which recipe is chosen: the best, of equal ones the first."""
    rows = []
    for (name, recipe), job in jobs.items():
        alike = {other: top1(done) for (its, other), done in jobs.items() if its == name}
        best = max(alike, key=alike.get)
        record = job.record
        rows.append(
            {"arm": name, "recipe": recipe, "held_out_top1": top1(job), "chosen": int(recipe == best), "n": 1}
            | {"minutes": record["seconds"] / 60, "command": job.command}
            | {"commit": record["commit"], "hardware": record["hardware"]}
            | {"versions": ", ".join(f"{key} {value}" for key, value in record["versions"].items())}
        )
    save_csv(path, rows)
    print(f"wrote {path}: " + ", ".join(f"{row['arm']} {row['recipe']}" for row in rows if row["chosen"]))


def read_tuning(path: Path) -> dict[str, str]:
    """The chosen recipe of every arm; empty before tuning."""
    if not path.exists():
        return {}
    with open(path, newline="") as file:
        return {row["arm"]: row["recipe"] for row in csv.DictReader(file) if row["chosen"] == "1"}


# --- command line -----------------------------------------------------------------------------------------------------


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(description=__doc__.split("\n\n")[0])
    add = parser.adder()
    titles = "; ".join(f"{name}: {claim.title}" for name, claim in CLAIMS.items())
    budgets = "; ".join(f"{name}: {budget['about']}" for name, budget in BUDGETS.items())
    add("--budget", one_of("budget", BUDGETS), "laptop", budgets)
    add("--claim", one_of("claim", CLAIMS), list(CLAIMS), f"default: all of {titles}", nargs="+")
    add("--seeds", count, None, "runs of every cell (default: the budget's)")
    add("--jobs", count, 1, "jobs side by side, which divide the cores; on two cores 2 is faster than 1")
    add("--tune", bool, False, "only choose fine-tuning's recipes, into tuning.csv of --results")
    add("--dry_run", bool, False, "only list the jobs and how long they take")
    add("--output_dir", str, "runs/reproduce", "where the jobs run, in a folder per budget", metavar="DIR")
    add("--results", str, None, "tables and figures (default: results, or results/<budget> for another than laptop)", metavar="DIR")
    args = merge(parser.parse_args(argv), parser.general)
    args.seeds = args.seeds or BUDGETS[args.budget]["seeds"]
    args.results = args.results or ("results" if args.budget == "laptop" else f"results/{args.budget}")
    return args


def main(args: argparse.Namespace) -> None:
    """Run what `args` (from `get_args`) ask for, and write the results."""
    budget, root, results = BUDGETS[args.budget], Path(args.output_dir) / args.budget, Path(args.results)
    plan = Plan(budget, root, {} if args.tune else read_tuning(results / "tuning.csv"))
    tuning = tuning_jobs(plan)
    cells = [job for name in args.claim for seed in range(args.seeds) for job in CLAIMS[name].jobs(plan, seed).values()]
    jobs = unique(tuning.values() if args.tune else cells)
    if args.dry_run:
        show(jobs, budget["speed"], args.jobs)
        return
    try:
        run_all(jobs, args.jobs)
    finally:
        if not args.tune:
            write_results(args.budget, plan, args.seeds, results)
    if args.tune:
        prepare_output_dir(str(results))
        write_tuning(tuning, results / "tuning.csv")


if __name__ == "__main__":
    run_script(main, get_args)
