"""The paper's claims, at a scale that anyone can rerun: one command for one claim, or for all of them.

    python reproduce.py --claim 1 2 --dry_run     # which jobs, and how long they take
    python reproduce.py --jobs 2                  # two single-threaded jobs side by side
    python reproduce.py --claim 1 --budget photographs --data_path CIFAR10

Jobs are runs of pretrain.py, finetune.py and analyze.py, shared between claims. The same command continues where it was
stopped. Tables, figures and a README with verdicts are written to --results from all jobs that have finished; rows that are
there already stay, if their settings are still these.
"""

import plumbing  # isort: skip (first: Ctrl-C then ends the imports below, which take seconds, without a traceback)
import argparse
import csv
import math
import os
import shlex
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from plumbing.files import prepare_output_dir, save_csv, write_atomically
from plumbing.flags import Parser, count, merge, one_of, seed_number
from plumbing.jobs import Job, run_all, seconds_of, show, unique
from plumbing.log import read_log
from plumbing.plots import COLOURS, new_figure, save_figure
from plumbing.script import counted, run_script

# All that a budget fixes. `common`, `pretrain`, `finetune` are flags of the scripts, fine-tuning's alike for pre-trained and random
# weights; the others:
#   seeds: those of the runs;   v1: flags of networks that start as ConvNeXt V1;
#   labels: images per class: epochs of fine-tuning; `usual`: how many of them claims take that are not about their number;
#   longer: times the epochs of supervised training that takes as long as pre-training and fine-tuning;
#   snapshots: encoders that are looked at along pre-training; measure_images: on how many pictures;
#   probe_images: pictures that the probe is fitted to, and judged by;
#   speed: images per second that --dry_run assumes until jobs have finished, for one core or one GPU.
BUDGETS = {
    "laptop": dict(
        about="embedded pictures at 32 pixels, ConvNeXt Yocto (ours, a fifth of Atto), two cores without a GPU",
        seeds=(12, 13, 14, 15, 16), size="yocto", images=4000, val_images=4000, classes=10,
        common=dict(data_set="embedded", embedded_images="4000 4000", input_size=32, stem_stride=1, hold_data=True),
        pretrain=dict(epochs=20, lr=2e-3, batch_size=64, decoder_embed_dim=128),
        finetune=dict(lr=2e-3, batch_size=16, clip_grad=1, layer_decay=1, weight_decay=0.05, head_init_scale=1),
        v1=dict(layer_scale_init_value=1),
        labels={5: 360, 20: 120, 100: 40}, usual=20, longer=2.8,
        snapshots=5, measure_images=500, probe_images=(4000, 4000),
        mask_ratios=(0.1, 0.6, 0.85),  # near the ends of the range that the paper tries, and its best
        decoder_depths=(1, 2, 4), decoder_widths=(64, 128, 256),
        speed=dict(pretrain=280, finetune=150, analyze=210),
    ),
    "gpu": dict(
        about="CIFAR-10 at 32 x 32, ConvNeXt Atto, one GPU; these settings have not been run",
        seeds=(12, 13, 14, 15, 16), size="atto", images=50_000, val_images=10_000, classes=10,
        common=dict(data_set="cifar10", input_size=32, stem_stride=1, batch_size=256, num_workers=8),
        pretrain=dict(epochs=100, blr=2e-3, decoder_embed_dim=256),
        # crops and flips alone, so that the data are held on the GPU
        finetune=dict(lr=2e-3, batch_size=64, clip_grad=1, layer_decay=1, aa="none", reprob=0.0, head_init_scale=1),
        v1=dict(layer_scale_init_value=1),
        labels={20: 400, 100: 200, 500: 100}, usual=100, longer=26,
        snapshots=8, measure_images=1000, probe_images=(20_000, 10_000),
        mask_ratios=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
        decoder_depths=(1, 2, 4), decoder_widths=(128, 256, 512),
        speed=dict(pretrain=10_000, finetune=10_000, analyze=10_000),
    ),
}  # fmt: skip
# The laptop's on photographs, which --data_path names: a check that drawn pictures do not mislead. About as many are seen in pre-training.
BUDGETS["photographs"] = BUDGETS["laptop"] | dict(
    about="the 50,000 + 10,000 photographs of CIFAR-10 as JPEG files; all else as at the laptop budget",
    images=50_000, val_images=10_000,
    common=dict(data_path=None, input_size=32, stem_stride=1, num_workers=0),
    pretrain=BUDGETS["laptop"]["pretrain"] | dict(epochs=2),
    finetune=BUDGETS["laptop"]["finetune"] | dict(aa="none", reprob=0),
    snapshots=2,
)  # fmt: skip
BASELINE = dict(mask_ratio=0.6, decoder="convnext", decoder_depth=1, backend="sparse", mlp_norm="grn")
COST = {"leaky": 2.4}  # of an image, relative to the sparse encoder


# --- jobs -------------------------------------------------------------------------------------------------------------


class Plan:
    """Makes the jobs of a budget. Equal settings give equal jobs, so that claims share them."""

    def __init__(self, budget: dict, root: Path):
        self.budget, self.root = budget, root
        self.step = max(1, budget["pretrain"]["epochs"] // budget["snapshots"])  # epochs between encoders that are looked at

    def pretrain(self, seed: int, version: str = "V2", **changes) -> Job:
        """Pre-training, with what differs from `BASELINE`."""
        budget = self.budget
        base = BASELINE | budget["pretrain"]
        changes = {name: value for name, value in changes.items() if value != base[name]}
        flags = budget["common"] | budget["pretrain"] | self._start(version) | changes
        visible = (1 - changes.get("mask_ratio", 0.6)) / 0.4
        work = flags["epochs"] * budget["images"] * COST.get(changes.get("backend"), 1.0) * visible
        flags |= dict(save_ckpt_freq=self.step, save_ckpt_num=2 * budget["snapshots"])
        return self._job(
            "pretrain", ["pretrain", version, *_words(changes)], seed, "encoder.pth", flags, version, (), work, not changes
        )

    def finetune(self, seed: int, start: Job | str, labels: int | None = None, longer: float = 1, **changes) -> Job:
        """Fine-tuning of a pre-training job's encoder, or from random weights: `start` is then "V1" or "V2".

        labels: images per class; longer: times the usual epochs.
        """
        budget, scratch = self.budget, isinstance(start, str)
        version, labels = start if scratch else start.name.split("-")[1], labels or budget["usual"]
        epochs = round(budget["labels"][labels] * longer)
        flags = budget["common"] | budget["finetune"] | changes
        flags |= dict(labels_per_class=labels, epochs=epochs, warmup_epochs=epochs / 10)
        flags |= dict(scratch=True) | self._start(version) if scratch else dict(finetune=start.file)
        flags |= dict(eval_freq=epochs, save_ckpt_freq=max(1, epochs // 10), save_ckpt_num=1)
        name = ["scratch", version] if scratch else ["finetune", *start.name.split("-")[1:-1]]
        name += _words({f"then_{key}": value for key, value in changes.items()} | dict(labels=labels))
        name += _words(dict(longer=longer if longer > 1 else None))
        work = epochs * labels * budget["classes"] + budget["val_images"] / 3
        return self._job("finetune", name, seed, "checkpoint-best.pth", flags, version, () if scratch else (start,), work)

    def probe(self, start: Job, untrained: bool = False) -> Job:
        """A linear probe, in closed form, of a pre-trained encoder, or of its network with the seed's random weights."""
        bank, queries = self.budget["probe_images"]
        flags = dict(checkpoint=start.file, label="pre-trained", bank_images=bank, num_images=queries)
        flags |= dict(untrained=True, seed=start.name.split("-seed")[1]) if untrained else {}
        name = f"{'untrained' if untrained else 'probe'}-{start.name.removeprefix('pretrain-')}"
        return self._look(name, "probe", flags, (start,), bank + queries)

    def course(self, seed: int, version: str, command: str) -> Job:
        """A command of analyze.py on encoders along pre-training, under the numbers of their epochs."""
        start = self.pretrain(seed, version)
        epochs = self.budget["pretrain"]["epochs"]
        places = sorted({*range(self.step, epochs + 1, self.step), epochs})
        files = " ".join(shlex.quote(str(start.directory / f"checkpoint-{place}.pth")) for place in places)
        flags = dict(checkpoint=files, label=" ".join(map(str, places)), num_images=self.budget["measure_images"])
        return self._look(f"{command}-{version}-seed{seed}", command, flags, (start,), len(places) * self.budget["measure_images"])

    def look(self, seed: int, name: str, command: str, start: Job) -> Job:
        """A command of analyze.py on one network."""
        flags = dict(checkpoint=start.file, label=name.replace(" ", "-"), num_images=self.budget["measure_images"])
        return self._look(f"{command}-{name.replace(' ', '-')}-seed{seed}", command, flags, (start,), self.budget["measure_images"])

    def command(self, job: Job) -> str:
        """What to type to run a job and what it needs, with DIR for the folder of photographs, which every machine has elsewhere."""
        folder = self.budget["common"].get("data_path")
        return job.command.replace(f"--data_path {shlex.quote(str(folder))} ", "--data_path DIR ")

    def _start(self, version) -> dict:
        return self.budget["v1"] if version == "V1" else {}

    def _look(self, name, command, flags, needs, work) -> Job:
        directory = self.root / name
        argv = (command, *_flags(flags | dict(output_dir=directory)))
        return Job(name, "analyze", directory, argv, f"{command}.csv", needs, work)

    def _job(self, script, name, seed, output, flags, version, needs=(), work=0.0, keep=False) -> Job:
        directory = self.root / "-".join([*name, f"seed{seed}"])
        model = f"convnext{'v2' if version == 'V2' else ''}_{self.budget['size']}"
        flags = dict(model=model) | flags | dict(seed=seed, output_dir=directory)
        return Job(directory.name, script, directory, tuple(_flags(flags)), output, needs, work, keep)


def _flags(settings: dict) -> list[str]:
    """Words of a command line. A text of several words is several values, a path is one."""
    words = []
    for name, value in settings.items():
        words += [f"--{name}", *(shlex.split(value) if isinstance(value, str) else ["true" if value is True else str(value)])]
    return words


def _words(changes: dict) -> list[str]:
    return [f"{name}_{value}" for name, value in changes.items() if value is not None]


# --- claims -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Expectation:
    """That a weighted sum of cells is above zero, or, for a `tie`, that it is about zero (`TIE`)."""

    text: str
    weights: dict[str, float]
    tie: bool = False


@dataclass(frozen=True)
class Reading:
    """A number that is read off a finished job: what it is, and how."""

    quantity: str  # with a % where it is an accuracy
    value: Callable[[Job], float]

    @property
    def digits(self) -> int:
        """Behind the point."""
        return 1 if "%" in self.quantity else 4

    @property
    def least(self) -> float:
        """The least difference that counts, where the paper has no number: points of accuracy, or of a measure from 0 to 1."""
        return TIE if "%" in self.quantity else 0.02


@dataclass(frozen=True)
class Claim:
    """A claim of the paper: the jobs of every cell and seed, by reading, and what the paper leads one to expect."""

    title: str
    cells: Callable[[Plan, int], dict[str, dict[str, Job]]]  # cell -> reading -> job
    expect: Callable[[list[str]], list[Expectation]]
    paper: dict[str, float]
    note: str = ""


def top1(job: Job) -> float:
    """Of the last epoch, in percent."""
    return [record["val_top1"] for record in read_log(job.directory) if "val_top1" in record][-1]


def rows_of(job: Job) -> list[dict]:
    """What analyze.py wrote about a network, or several; V2 after GRN."""
    with open(job.file, newline="") as file:
        rows = list(csv.DictReader(file))
    return [row for row in rows if row.get("tensor") == "after GRN"] or rows


def probed(job: Job) -> float:
    """Accuracy of the probe on the last two stages, of the last network in the table."""
    return [float(row["accuracy"]) for row in rows_of(job) if row["features"] == "stages 3, 4"][-1]


def along(job: Job, measure: Callable[[list[dict]], float]) -> dict[str, float]:
    """A measure of every network in a job's table, by its label."""
    rows = rows_of(job)
    return {
        name: measure([row for row in rows if row["checkpoint"] == name]) for name in dict.fromkeys(r["checkpoint"] for r in rows)
    }


def last(measure: Callable[[list[dict]], float]) -> Callable[[Job], float]:
    """The measure of the last network in a job's table."""
    return lambda job: list(along(job, measure).values())[-1]


def mean_of(column: str) -> Callable[[list[dict]], float]:
    """Mean of a column over layers, those without a number left out."""
    return lambda rows: statistics.fmean(v for row in rows if not math.isnan(v := float(row[column])))


def deep_selectivity(rows: list[dict]) -> float:
    """Class selectivity index, mean over the channels of the last third of the blocks."""
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    deep = set(layers[-max(1, len(layers) // 3) :])
    return mean_of("class_selectivity_index")([row for row in rows if row["layer"] in deep])


def gamma_spread(rows: list[dict]) -> float:
    """From the 5th to the 95th percentile of GRN's gamma over channels, mean over blocks."""
    its = [row for row in rows if row["quantity"] == "gamma"]
    return mean_of("percentile_95")(its) - mean_of("percentile_5")(its)


READINGS = {
    "fine-tuning": Reading("top-1 after fine-tuning, %", top1),
    "probe": Reading("top-1 of the probe, %", probed),
    "collapse": Reading("feature cosine distance, mean over layers", last(mean_of("cosine_distance_mean"))),
    "selectivity": Reading("class selectivity index, mean over the last third of the blocks", last(deep_selectivity)),
}
# Along pre-training: what is measured, by which command of analyze.py.
COURSES = {
    "feature cosine distance": ("collapse", mean_of("cosine_distance_mean")),
    "dead channels, %": ("collapse", mean_of("dead_percent_mean")),
    "effective rank": ("collapse", mean_of("effective_rank_mean")),
    "class selectivity index": ("selectivity", deep_selectivity),
    "spread of GRN's gamma": ("grn", gamma_spread),
}


def read(plan: Plan, seed: int, start: Job, **changes) -> dict[str, Job]:
    """Both readings of an encoder."""
    return {"fine-tuning": plan.finetune(seed, start, **changes), "probe": plan.probe(start)}


def variants(plan: Plan, seed: int, cells: dict[str, dict]) -> dict[str, dict[str, Job]]:
    """Pre-trained with each variant's flags, and read alike."""
    return {cell: read(plan, seed, plan.pretrain(seed, **flags)) for cell, flags in cells.items()}


def four_cells(plan: Plan, seed: int) -> dict[str, dict[str, Job]]:
    """V1 and V2, supervised and with FCMAE, and what their features are worth untrained; supervised takes the fine-tuning's steps."""
    found = {}
    for version in ("V1", "V2"):
        start = plan.pretrain(seed, version)
        found[f"{version} untrained"] = {"probe": plan.probe(start, untrained=True)}
        found[f"{version} supervised"] = {"fine-tuning": plan.finetune(seed, version)}
        found[f"{version} FCMAE"] = read(plan, seed, start)
    return found


def collapse_cells(plan: Plan, seed: int) -> dict[str, dict[str, Job]]:
    """Claim 3: encoders as pre-trained, and the V1 classifier trained from random weights."""
    found = {f"{version} FCMAE": {"collapse": plan.course(seed, version, "collapse")} for version in ("V1", "V2")}
    return found | {"V1 supervised": {"collapse": plan.look(seed, "V1 supervised", "collapse", plan.finetune(seed, "V1"))}}


def selectivity_cells(plan: Plan, seed: int) -> dict[str, dict[str, Job]]:
    """Claim 9: encoders as pre-trained."""
    return {f"{version} FCMAE": {"selectivity": plan.course(seed, version, "selectivity")} for version in ("V1", "V2")}


def grn_cells(plan: Plan, seed: int) -> dict[str, dict[str, Job]]:
    """Claim 6: GRN in pre-training, in fine-tuning, or in both."""
    with_grn, without = plan.pretrain(seed), plan.pretrain(seed, mlp_norm="none")
    jobs = {
        "in both stages": plan.finetune(seed, with_grn),
        "dropped at fine-tuning": plan.finetune(seed, with_grn, mlp_norm="none"),
        "added at fine-tuning": plan.finetune(seed, without, mlp_norm="grn"),
    }
    return {cell: {"fine-tuning": job} for cell, job in jobs.items()}


def decoder_cells(plan: Plan, seed: int) -> dict[str, dict[str, Job]]:
    """Claim 7: each decoder."""
    cells = {"one ConvNeXt block": {}}
    cells |= {cell: dict(decoder=name) for cell, name in DECODER_CELLS.items()}
    cells |= {f"depth {depth}": dict(decoder_depth=depth) for depth in plan.budget["decoder_depths"] if depth > 1}
    usual = plan.budget["pretrain"]["decoder_embed_dim"]
    cells |= {f"width {width}": dict(decoder_embed_dim=width) for width in plan.budget["decoder_widths"] if width != usual}
    return variants(plan, seed, cells)


def label_cells(plan: Plan, seed: int) -> dict[str, dict[str, Job]]:
    """Fine-tuning on each number of labels per class, with and without pre-training; once without for as long as both take."""
    starts, budget = {"FCMAE": plan.pretrain(seed), "supervised": "V2"}, plan.budget
    found = {f"{name}, {n} per class": plan.finetune(seed, start, n) for n in budget["labels"] for name, start in starts.items()}
    found[f"supervised as long, {budget['usual']} per class"] = plan.finetune(seed, "V2", longer=budget["longer"])
    return {cell: {"fine-tuning": job} for cell, job in found.items()}


def above(best: str, others: Iterable[str]) -> list[Expectation]:
    """That one cell is above each of the others."""
    return [Expectation(f"{best} above {other}", {best: 1, other: -1}) for other in others]


def ties(first: str, others: Iterable[str]) -> list[Expectation]:
    """That `first` is about as good as each of the others."""
    return [Expectation(f"{first} as {other}", {first: 1, other: -1}, tie=True) for other in others]


def expect_middle_ratios(cells: list[str]) -> list[Expectation]:
    """That the mean of 50 to 70% is above the means of the lower and of the higher ratios."""
    ratio = {cell: int(cell.split("%")[0]) for cell in cells}
    middle = [cell for cell in cells if 50 <= ratio[cell] <= 70]
    found = []
    for words, side in (("lower", [c for c in cells if ratio[c] < 50]), ("higher", [c for c in cells if ratio[c] > 70])):
        mean = dict.fromkeys(middle, 1 / len(middle)) | dict.fromkeys(side, -1 / len(side))
        found.append(Expectation(f"50 to 70% above the {words} ratios", mean))
    return found


def expect_fewer_labels(cells: list[str]) -> list[Expectation]:
    """That FCMAE is above supervised training at each number of labels, and above the longer one."""
    pairs = [(f"FCMAE, {cell.split(', ')[1]}", cell) for cell in cells if not cell.startswith("FCMAE")]
    return [Expectation(f"{first} above {other.split(', ')[0]}", {first: 1, other: -1}) for first, other in pairs]


NORM_CELLS = {"GRN": "grn", "nothing (V2 without GRN)": "none", "LRN": "lrn", "BN": "bn", "LN": "ln", "SE": "se", "CBAM": "cbam"}
GRN_CELLS = {"GRN": "grn", "average": "grn_average", "L1": "grn_l1", "standardised": "grn_standardise"}
GRN_CELLS |= {"inverse sum": "grn_inverse", "no skip": "grn_no_skip"}
DECODER_CELLS = {"U-Net with skip": "unet_skip", "U-Net without": "unet", "transformer": "transformer"}


def norm_cells(plan: Plan, seed: int, cells: dict[str, str]) -> dict[str, dict[str, Job]]:
    """Claims 4 and 5: each of `cells` in GRN's place, in pre-training and fine-tuning."""
    return variants(plan, seed, {cell: dict(mlp_norm=name) for cell, name in cells.items()})


# The paper's numbers are those of ConvNeXt-Base on ImageNet-1K, top-1 after fine-tuning.
CLAIMS = {
    "1": Claim(
        "Sparse encoding: masks inside the encoder, not only before it",
        lambda plan, seed: variants(plan, seed, {"sparse": {}, "leaky": dict(backend="leaky")}),
        lambda cells: above("sparse", ["leaky"]),
        {"sparse": 83.7, "leaky": 79.3},
        "Leaky: no masks inside, so that hidden and visible sites mix. Masks inside by dense convolutions are the sparse encoder's "
        "function, which tests show to float32's rounding, and are no cell.",
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
        "Supervised cells have the steps of fine-tuning; the FCMAE cells' pre-training comes on top of them, without labels.",
    ),
    "3": Claim(
        "Feature collapse of V1 under FCMAE",
        collapse_cells,
        lambda cells: above("V2 FCMAE", ["V1 FCMAE"]) + above("V1 supervised", ["V1 FCMAE"]),
        {},
        "4C-wide features, V2's after GRN, at the end of pre-training; its course stands in course.png. In the paper's Fig. 4, after 800 "
        "epochs, V1 FCMAE falls low, V1 supervised only in the last layers.",
    ),
    "4": Claim(
        "GRN's parts: aggregation, normalisation, skip",
        lambda plan, seed: norm_cells(plan, seed, GRN_CELLS),
        lambda cells: above("GRN", [cell for cell in cells if cell not in ("GRN", "standardised")]) + ties("GRN", ["standardised"]),
        {"GRN": 84.6, "average": 83.7, "L1": 84.3, "standardised": 84.5, "inverse sum": 83.8, "no skip": 84.0},
    ),
    "5": Claim(
        "What stands in GRN's place",
        lambda plan, seed: (
            norm_cells(plan, seed, NORM_CELLS) | {"nothing (V1, LayerScale)": read(plan, seed, plan.pretrain(seed, "V1"))}
        ),
        lambda cells: above("GRN", [cell for cell in cells if cell not in ("GRN", "SE", "CBAM")]) + ties("GRN", ["SE", "CBAM"]),
        {"GRN": 84.6, "nothing (V1, LayerScale)": 83.7, "LRN": 83.2, "BN": 80.5, "LN": 83.8, "SE": 84.4, "CBAM": 84.5},
        "CBAM here weighs a site by itself, without the 7x7 neighbourhood (ablations/norms.py).",
    ),
    "6": Claim(
        "GRN is needed in both stages",
        grn_cells,
        lambda cells: above("in both stages", ["dropped at fine-tuning", "added at fine-tuning"]),
        {"in both stages": 84.6, "dropped at fine-tuning": 78.8, "added at fine-tuning": 80.6},
        "Without GRN a V2 block has no LayerScale either.",
    ),
    "7": Claim(
        "A plain decoder is enough",
        decoder_cells,
        lambda cells: ties(cells[0], cells[1:]),
        {"one ConvNeXt block": 83.7, "U-Net with skip": 83.7, "U-Net without": 83.5, "transformer": 83.4}
        | {"depth 2": 83.5, "depth 4": 83.7, "width 256": 83.7, "width 512": 83.7},
        "In the paper pre-training takes 12.9, 12.9, 8.5 and 7.7 hours with U-Net with and without skip, transformer, and one ConvNeXt block.",
    ),
    "8": Claim(
        "Mask ratio: half to two thirds hidden is best",
        lambda plan, seed: variants(
            plan, seed, {f"{ratio:.0%} hidden": dict(mask_ratio=ratio) for ratio in plan.budget["mask_ratios"]}
        ),
        expect_middle_ratios,
        {},
        "The paper finds 50 to 70% good and 60% best, in a figure.",
    ),
    "9": Claim(
        "Class selectivity: V2's deep channels are more class-generic than V1's",
        selectivity_cells,
        lambda cells: above("V1 FCMAE", ["V2 FCMAE"]),
        {},
        "Encoders as pre-trained, at the end; the course stands in course.png. The paper shows histograms.",
    ),
    "labels": Claim(
        "Accuracy against labels: what pre-training saves",
        label_cells,
        expect_fewer_labels,
        {},
        "Not an experiment of the paper. The same images, chosen by the seed, and the same steps with and without pre-training; once as many "
        "supervised steps as take the time of pre-training and fine-tuning together.",
    ),
}


# --- results ----------------------------------------------------------------------------------------------------------

# Student's t, 97.5%, by degrees of freedom from 1 to 10; more take the last, which is a little too strict.
T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)
TIE = 2.0  # points of accuracy: cells whose difference is certainly smaller are about equal
PROTOCOL = Path(__file__).parent / "results" / "protocol.md"  # by hand, as is conclusions.md beside results; put into the README


@dataclass(frozen=True)
class Difference:
    """A weighted sum of cells, of every seed that has them all, by one reading: pairs share whatever a seed draws."""

    expectation: Expectation
    reading: str
    values: tuple[float, ...]  # of the seeds
    least: float = 0.0  # that counts: what is certainly smaller is no such difference

    @property
    def mean(self) -> float:
        """Over seeds."""
        return statistics.fmean(self.values)

    @property
    def margin(self) -> float:
        """Half the 95% interval of the mean; infinite for one seed."""
        n = len(self.values)
        return math.inf if n < 2 else T[min(n - 1, len(T)) - 1] * statistics.stdev(self.values) / math.sqrt(n)

    @property
    def outcome(self) -> str:
        """ "holds" if the interval lies above zero, else "fails" if it lies below `least`; for a tie, within `TIE` or beyond it."""
        if self.expectation.tie:
            return "holds" if abs(self.mean) + self.margin < TIE else "fails" if abs(self.mean) - self.margin > TIE else "open"
        return "holds" if self.mean > self.margin else "fails" if self.mean + self.margin < self.least else "open"

    @property
    def seeds_to_decide(self) -> float:
        """How many seeds would decide it, were mean and spread those of now; infinite if none would."""
        distance = abs(abs(self.mean) - TIE) if self.expectation.tie else max(self.mean, self.least - self.mean)
        spread = statistics.stdev(self.values) if len(self.values) > 1 else math.inf
        tried = range(len(self.values) + 1, 100_000)
        return next((n for n in tried if T[min(n - 1, len(T)) - 1] * spread / math.sqrt(n) < distance), math.inf)


def differences(claim: Claim, values: dict[str, dict[str, dict[int, float]]]) -> list[Difference]:
    """Every expectation by every reading that has a seed with all of its cells. values: cell -> reading -> seed -> number."""
    found = []
    for expectation in claim.expect(list(values)):
        for reading in READINGS:
            cells = {cell: values[cell].get(reading, {}) for cell in expectation.weights}
            seeds = sorted(set.intersection(*(set(numbers) for numbers in cells.values())))
            sums = tuple(sum(w * cells[cell][seed] for cell, w in expectation.weights.items()) for seed in seeds)
            least = (paper_difference(claim, expectation) or 2 * READINGS[reading].least) / 2
            found += [Difference(expectation, reading, sums, least)] if sums else []
    return found


def judge(found: list[Difference], expected: int) -> str:
    """Three words: a reading holds if all `expected` expectations of the claim do by it, and fails if one does; one reading that decides
    is enough, unless another decides otherwise."""
    outcomes = set()
    for reading in {difference.reading for difference in found}:
        its = [difference.outcome for difference in found if difference.reading == reading]
        outcomes.add("fails" if "fails" in its else "holds" if its == ["holds"] * expected else "open")
    decided = outcomes - {"open"}
    return {"holds": "it holds here", "fails": "it fails here"}[decided.pop()] if len(decided) == 1 else "not yet decided"


def rows_elsewhere(results: Path) -> dict[tuple[str, ...], list[dict]]:
    """The rows of the tables in `results`, by the settings of the command that made them: those of another machine count, too."""
    found = {}
    for path in sorted(results.glob("*.csv")):
        with open(path, newline="") as file:
            for row in csv.DictReader(file):
                found.setdefault(_settings(row.get("command", "")), []).append(row)
    return found


def _settings(command: str) -> tuple[str, ...]:
    """A command's words without the folders of its files."""
    return tuple(Path(word).name for word in shlex.split(command))


def rows_of_claim(claim: Claim, plan: Plan, seeds: Iterable[int], elsewhere: dict) -> list[dict]:
    """A row for every number that there is, and everything that belongs to it: of the jobs finished here, else from `elsewhere`."""
    rows = []
    for seed in seeds:
        for cell, jobs in claim.cells(plan, seed).items():
            for reading, job in jobs.items():
                place = dict(cell=cell, reading=reading, seed=seed)
                if job.finished:
                    records = [part.record for part in unique([job])]
                    rows.append(
                        place
                        | {"value": f"{READINGS[reading].value(job):.6g}"}
                        | {"minutes": f"{sum(record['seconds'] for record in records) / 60:.3g}", "command": plan.command(job)}
                        | {key: "; ".join(dict.fromkeys(record[key] for record in records)) for key in ("commit", "hardware")}
                        | {"versions": ", ".join(f"{name} {version}" for name, version in records[-1]["versions"].items())}
                    )
                else:
                    same = (row for row in elsewhere.get(_settings(plan.command(job)), ()) if row.get("reading") == reading)
                    rows += [row | place for row in list(same)[:1]]
    return rows


def by_cell(rows: list[dict], cells: Iterable[str]) -> dict[str, dict[str, dict[int, float]]]:
    """cell -> reading -> seed -> number."""
    values = {cell: {} for cell in cells}
    for row in rows:
        values[row["cell"]].setdefault(row["reading"], {})[row["seed"]] = float(row["value"])
    return values


def table_of(claim: Claim, values: dict) -> list[str]:
    """Mean and deviation over seeds of every cell and reading, as Markdown, with a warning where cells have not the same seeds."""
    readings = [name for name in READINGS if any(name in found for found in values.values())]
    paper = [" the paper's |", "---|"] if claim.paper else ["", ""]
    lines = [f"| | {' | '.join(READINGS[name].quantity for name in readings)} |{paper[0]}"]
    lines += [f"|---|{'---|' * len(readings)}{paper[1]}"]
    for cell, found in values.items():
        shown = [_mean(list(found[name].values()), READINGS[name].digits) if name in found else "" for name in readings]
        lines.append(f"| {cell} | {' | '.join(shown)} |" + (f" {claim.paper.get(cell, '')} |" if claim.paper else ""))
    seeds = {(name, frozenset(found[name])) for found in values.values() for name in found}
    unequal = "Not all cells have the same seeds; where they differ, means do not compare, and the differences below are of pairs."
    return [*lines, "", unequal] if len(seeds) > len(readings) else lines


def _mean(numbers: list[float], digits: int) -> str:
    spread = f" ± {statistics.stdev(numbers):.{digits}f}" if len(numbers) > 1 else ""
    return f"{statistics.fmean(numbers):.{digits}f}{spread} ({len(numbers)})"


def paper_difference(claim: Claim, expectation: Expectation) -> float | None:
    """The same sum of the paper's numbers, where it has them all."""
    known = [claim.paper.get(cell) for cell in expectation.weights]
    return None if None in known else sum(w * value for w, value in zip(expectation.weights.values(), known))


def describe(claim: Claim, found: list[Difference], hours: float) -> list[str]:
    """A line for every difference. hours: of a seed, on one core or GPU."""
    lines = []
    for each in found:
        paper, digits = paper_difference(claim, each.expectation), READINGS[each.reading].digits
        low, high = (f"{bound:+.{digits}f}" for bound in (each.mean - each.margin, each.mean + each.margin))
        interval = f"95%: {low} to {high}" if each.margin < math.inf else "one seed shows no spread"
        beside = "" if paper is None else f", the paper's {paper:+.1f}"
        line = f"{each.expectation.text}, {each.reading}: {each.mean:+.{digits}f} ({interval}; {counted(len(each.values), 'seed')}{beside}): "
        line += each.outcome
        if each.outcome == "fails" and each.mean + each.margin >= 0 and not each.expectation.tie:
            line += f", as less than {each.least:+.{max(digits, 2)}f}"
        if each.outcome == "open" and each.seeds_to_decide < math.inf:
            n, more = each.seeds_to_decide, each.seeds_to_decide - len(each.values)
            line += f"; if spread and mean stay, {n:,} seeds would decide it: {more:,} more, {more * hours:,.1f} hours on one core or GPU"
        lines.append(f"* {line}")
    return lines


def draw(claim: Claim, found: list[Difference], path: Path) -> None:
    """Every difference with its interval, its seeds as points, the least that counts, and the paper's beside it."""
    names = list(dict.fromkeys(each.expectation.text for each in found))
    readings = [name for name in READINGS if any(each.reading == name for each in found)]
    figure, axes = new_figure(1, 1, 8.5, 1.6 + 0.55 * len(names))
    axis = axes[0, 0]
    axis.axvline(0, color="black", linewidth=1)
    if any(each.expectation.tie for each in found):
        axis.axvspan(-TIE, TIE, color="grey", alpha=0.15, linewidth=0, label="about equal")
    for each in found:
        k = readings.index(each.reading)
        y = names.index(each.expectation.text) + 0.25 * (k - (len(readings) - 1) / 2)
        label = each.reading if each is next(other for other in found if other.reading == each.reading) else None
        margin = 0.0 if each.margin == math.inf else each.margin
        axis.errorbar(each.mean, y, xerr=margin, fmt="o", color=COLOURS[k], capsize=4, linewidth=2, label=label)
        axis.scatter(each.values, [y] * len(each.values), color="black", s=14, alpha=0.6, linewidth=0, zorder=3)
        if not each.expectation.tie:
            counts = None if each is not found[0] else "least that counts"
            axis.plot([each.least] * 2, [y - 0.12, y + 0.12], color="black", linestyle=":", label=counts)
    papers = [(paper, k) for k, name in enumerate(names) for each in found if each.expectation.text == name
              and (paper := paper_difference(claim, each.expectation)) is not None]  # fmt: skip
    if papers:
        axis.scatter(*zip(*papers), marker="D", facecolor="none", edgecolor="black", s=45, label="the paper's", zorder=3)
    axis.set_yticks(range(len(names)), names, fontsize=11)
    axis.set_ylim(len(names) - 0.5, -0.5)
    quantity = READINGS[readings[0]].quantity
    axis.set_xlabel(f"difference, {'points of accuracy' if '%' in quantity else quantity}", fontsize=11)
    axis.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=4, fontsize=11, frameon=False)
    axis.set_title(claim.title, fontsize=12)
    save_figure(figure, path)


def course_rows(plan: Plan, seeds: Iterable[int], elsewhere: dict) -> list[dict]:
    """Every measure of `COURSES` along pre-training, of the jobs finished here, else from `elsewhere`."""
    rows = []
    for seed, version, (name, (command, measure)) in product(seeds, ("V1", "V2"), COURSES.items()):
        job = plan.course(seed, version, command)
        place = dict(network=version, seed=seed, measure=name)
        if job.finished:
            found = along(job, measure).items()
            rows += [place | dict(epoch=epoch, value=f"{value:.6g}", command=plan.command(job)) for epoch, value in found]
        else:
            rows += [row for row in elsewhere.get(_settings(plan.command(job)), ()) if row.get("measure") == name]
    return [row | dict(seed=int(row["seed"])) for row in rows]


def draw_course(rows: list[dict], path: Path) -> None:
    """A panel a measure: every seed as a line, epochs of pre-training along x."""
    names = [name for name in COURSES if any(row["measure"] == name for row in rows)]
    figure, axes = new_figure(-(-len(names) // 3), 3, 11, 3.4 * -(-len(names) // 3))
    for axis in axes.flat[len(names) :]:
        axis.set_axis_off()
    for axis, name in zip(axes.flat, names):
        for k, version in enumerate(("V1", "V2")):
            for seed in sorted({row["seed"] for row in rows}):
                its = [row for row in rows if (row["network"], row["seed"], row["measure"]) == (version, seed, name)]
                x, y = [int(row["epoch"]) for row in its], [float(row["value"]) for row in its]
                axis.plot(x, y, color=COLOURS[k], marker="o", markersize=3, alpha=0.7)
            axis.plot([], color=COLOURS[k], label=version)
        axis.set_title(name, fontsize=12)
        axis.set_xlabel("epochs of pre-training", fontsize=11)
        axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=11)
    save_figure(figure, path)


def write_results(budget_name: str, plan: Plan, seeds: Sequence[int], results: Path) -> None:
    """README.md, a CSV and a figure per claim, and the course of pre-training, from all jobs that have finished."""
    prepare_output_dir(str(results))
    elsewhere = rows_elsewhere(results)
    seeds = sorted({*seeds, *plan.budget["seeds"], *(int(row["seed"]) for rows in elsewhere.values() for row in rows)})
    budget, sections, summary, missing, comparisons = plan.budget, [], [], [], 0
    conclusions = (results / "conclusions.md").read_text() if (results / "conclusions.md").exists() else ""
    conclusions = {part.split("\n")[0].strip(): part.split("\n", 1)[1].strip() for part in conclusions.split("\n## ")[1:]}
    for name, claim in CLAIMS.items():
        path, cells = results / f"claim_{name}.csv", claim.cells(plan, seeds[0])
        rows = rows_of_claim(claim, plan, seeds, elsewhere)
        values = by_cell(rows, cells)
        found = differences(claim, values)
        if not found:
            missing.append(f"{name} ({claim.title})")
            continue
        comparisons += len(found)
        save_csv(path, rows)
        hours = sum(seconds_of(jobs_of([name], plan, seeds), budget["speed"]).values()) / 3600 / len(seeds)
        verdict = judge(found, len(claim.expect(list(cells))))
        needed = [(cell, reading) for cell, jobs in cells.items() for reading in jobs]
        complete = all(set(budget["seeds"]) <= values[cell].get(reading, {}).keys() for cell, reading in needed)
        verdict += "" if complete else ", so far"
        summary.append(f"| {name} | {claim.title} | {verdict} |")
        draw(claim, found, results / f"claim_{name}.png")
        flag = "" if budget_name == "laptop" else f" --budget {budget_name}"
        flag += " --data_path DIR" if "data_path" in budget["common"] else ""
        sections += ["", f"## {'Claim ' if name != 'labels' else ''}{name}. {claim.title}", ""]
        sections += [f"**{verdict.capitalize()}.** {claim.note}".rstrip(), ""]
        sections += [f"    python reproduce.py{flag} --claim {name} --jobs 2", ""]
        sections += [f"![{claim.title}](claim_{name}.png)", "", *table_of(claim, values), ""]
        sections += [*describe(claim, found, hours), ""]
        sections += [conclusions[name], ""] if name in conclusions else []
        sections += [f"Commands, commit, hardware and versions of every number: [{path.name}]({path.name})."]
    if course := course_rows(plan, seeds, elsewhere):
        save_csv(results / "course.csv", course)
        draw_course(course, results / "course.png")
        sections += ["", "## Along pre-training", "", "![Features along pre-training, V1 and V2](course.png)"]
    head = [f"# The paper's claims at the {budget_name} budget", "", "Written by `reproduce.py`; do not edit.", ""]
    head += [f"Budget: {budget['about']}."]
    head += ["The paper's own numbers are of ConvNeXt-Base on ImageNet-1K, and stand beside ours for their direction.", ""]
    head += ["| | claim | verdict |", "|---|---|---|", *summary, ""]
    head += [f"Not run: {'; '.join(missing)}." if missing else "All claims were run.", ""]
    if comparisons:
        chance = f"by chance alone about {comparisons / 20:.1f} of as many true ties would seem to be differences"
        head += [f"{counted(comparisons, 'comparison')}; {chance}.", ""]
    own = results.resolve() == PROTOCOL.parent
    protocol = PROTOCOL.read_text().rstrip() if own else f"See [{PROTOCOL.name}]({os.path.relpath(PROTOCOL, results)})."
    text = "\n".join([*head, "## Protocol", "", protocol, *sections]) + "\n"
    write_atomically(results / "README.md", lambda file: file.write_text(text))
    print(f"wrote {results / 'README.md'}, with {len(summary)} of {len(CLAIMS)} claims")


# --- command line -----------------------------------------------------------------------------------------------------


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(description=__doc__.split("\n\n")[0])
    add = parser.adder()
    titles = "; ".join(f"{name}: {claim.title}" for name, claim in CLAIMS.items())
    budgets = "; ".join(f"{name}: {budget['about']}" for name, budget in BUDGETS.items())
    add("--budget", one_of("budget", BUDGETS), "laptop", budgets)
    add("--data_path", str, None, "for --budget photographs: small ones, in DIR/train/<class>/ and DIR/val/<class>/", metavar="DIR")
    add("--claim", one_of("claim", CLAIMS), list(CLAIMS), f"default: all of {titles}", nargs="+")
    add("--seeds", seed_number, None, "to run (default: the budget's, which are reported in any case)", nargs="+", metavar="SEED")
    add("--missing", bool, False, "run only what the tables in --results lack, as to go on with what another machine began")
    add("--jobs", count, 1, "jobs side by side, which divide the cores; on two cores 2 is faster than 1")
    add("--dry_run", bool, False, "only list the jobs and how long they take")
    add("--output_dir", str, "runs/reproduce", "where the jobs run, in a folder per budget", metavar="DIR")
    add("--results", str, None, "tables and figures (default: results, or results/<budget> for another than laptop)", metavar="DIR")
    args = merge(parser.parse_args(argv), parser.general)
    if ("data_path" in BUDGETS[args.budget]["common"]) != (args.data_path is not None):
        words = "takes no --data_path" if args.data_path else "needs --data_path DIR, photographs in class folders"
        parser.error(f"--budget {args.budget} {words}")
    args.seeds = args.seeds or BUDGETS[args.budget]["seeds"]
    args.results = args.results or ("results" if args.budget == "laptop" else f"results/{args.budget}")
    return args


def jobs_of(claims: Iterable[str], plan: Plan, seeds: Iterable[int], elsewhere: Iterable[tuple[str, ...]] = ()) -> list[Job]:
    """All jobs of these claims, seed by seed, those of the course of pre-training beside claims 3 and 9; not those of `elsewhere`."""
    jobs = []
    for seed in seeds:
        jobs += [job for name in claims for readings in CLAIMS[name].cells(plan, seed).values() for job in readings.values()]
        jobs += [plan.course(seed, "V2", "grn")] if "3" in claims else []
    return unique(job for job in jobs if _settings(plan.command(job)) not in elsewhere)


def main(args: argparse.Namespace) -> None:
    """Run what `args` (from `get_args`) ask for, and write the results."""
    budget, root, results = BUDGETS[args.budget], Path(args.output_dir) / args.budget, Path(args.results)
    if args.data_path:
        budget = budget | dict(common=budget["common"] | dict(data_path=Path(args.data_path)))
    plan = Plan(budget, root)
    jobs = jobs_of(args.claim, plan, args.seeds, rows_elsewhere(results) if args.missing else ())
    if args.dry_run:
        show(jobs, budget["speed"], args.jobs)
        return
    try:
        run_all(jobs, args.jobs, lambda job: f"top-1 {top1(job):.2f}%, " if job.script == "finetune" else "")
    finally:
        write_results(args.budget, plan, args.seeds, results)


if __name__ == "__main__":
    run_script(main, get_args)
