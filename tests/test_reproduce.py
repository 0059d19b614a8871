"""Claims about reproduce.py, by running all of it at the toy budget, which takes a minute: `pytest -m slow`."""

import csv
import json
import math
import os
import shlex
import shutil
import time
from collections import Counter
from pathlib import Path
from threading import Thread

import pytest
import torch
from PIL import Image

import analyze
import data
import finetune
import pretrain
import reproduce
from data import TEXTURES, Images, draw_images
from plumbing import jobs as plumbing_jobs
from plumbing.jobs import Job, run_all, unique
from plumbing.log import duration, read_log
from plumbing.script import UserError
from plumbing.signals import STOP_SIGNALS
from reproduce import BUDGETS, CLAIMS, Claim, Difference, Expectation, Plan

# Fourteen drawn pictures of two classes; the numbers mean nothing.
BUDGETS["toy"] = dict(
    about="fourteen embedded pictures, for testing this file; its numbers mean nothing",
    seeds=(0,), size="yocto", images=10, val_images=4, classes=2,
    common=dict(data_path=None, input_size=32, stem_stride=1, batch_size=4, num_workers=0),
    pretrain=dict(epochs=2, blr=0.1, decoder_embed_dim=32, warmup_epochs=0),
    finetune=dict(aa="none", reprob=0.0, input_size=16, blr=0.1), v1=dict(layer_scale_init_value=0.5),
    labels={2: 2, 5: 1}, usual=5, longer=2, snapshots=2, measure_images=4, probe_images=(10, 4),
    mask_ratios=(0.3, 0.6, 0.8), decoder_depths=(1, 2), decoder_widths=(16, 32),
    speed=dict(pretrain=40, finetune=40, analyze=40),
)  # fmt: skip


def draw_toy_data(root: Path) -> None:
    """The toy budget's pictures, five to train on and two to validate with of each class."""
    images, labels = draw_images(100, seed=0, size=32)
    for label, name in enumerate(TEXTURES[:2]):
        for i, image in enumerate(images[labels == label][:7]):
            path = root / ("train" if i < 5 else "val") / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)


def run(folder: Path, *words: str) -> None:
    places = ["--data_path", str(folder / "pictures"), "--output_dir", str(folder / "runs"), "--results", str(folder / "results")]
    reproduce.main(reproduce.get_args(["--budget", "toy", *places, *words]))


def table(path: Path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    """Everything, once: the runs and the results."""
    folder = tmp_path_factory.mktemp("toy")
    draw_toy_data(folder / "pictures")
    BUDGETS["toy"]["common"]["data_path"] = str(folder / "pictures")
    run(folder, "--jobs", "2")
    return folder


# --- all of it


@pytest.mark.slow
def test_every_claim_gets_a_table_and_a_verdict(toy):
    readme = (toy / "results" / "README.md").read_text()
    assert "All claims were run." in readme
    for name, claim in CLAIMS.items():
        assert claim.title in readme
        rows = table(toy / "results" / f"claim_{name}.csv")
        cells = claim.cells(Plan(BUDGETS["toy"], toy), 0)
        assert {(row["cell"], row["reading"]) for row in rows} == {(cell, name) for cell, jobs in cells.items() for name in jobs}
        assert all(math.isfinite(float(row["value"])) for row in rows)
        assert min(Image.open(toy / "results" / f"claim_{name}.png").size) > 150
    assert readme.count("not yet decided |") == len(CLAIMS)  # one seed shows no difference
    rows = table(toy / "results" / "course.csv")
    assert {(row["network"], row["measure"]) for row in rows} == {
        (version, name)
        for version in ("V1", "V2")
        for name in reproduce.COURSES
        if (version, name) != ("V1", "spread of GRN's gamma")
    }
    assert {row["epoch"] for row in rows} == {"1", "2"} and Image.open(toy / "results" / "course.png").width > 400


@pytest.mark.slow
def test_a_number_comes_with_its_command_commit_hardware_versions_and_time(toy):
    for row in table(toy / "results" / "claim_2.csv"):
        assert row["commit"] and "core" in row["hardware"] + "cores" and f"torch {torch.__version__}" in row["versions"]
        commands = row["command"].split(" && ")
        assert len(commands) == (1 if "supervised" in row["cell"] else 2) and float(row["minutes"]) > 0
        if row["reading"] == "probe":
            continue
        last = finetune.get_args(shlex.split(commands[-1])[2:])
        logged = [record["val_top1"] for record in read_log(Path(last.output_dir)) if "val_top1" in record]
        assert float(row["value"]) == pytest.approx(logged[-1], rel=1e-5) and row["seed"] == "0"


@pytest.mark.slow
def test_jobs_shared_between_claims_run_once(toy):
    jobs = reproduce.jobs_of(CLAIMS, Plan(BUDGETS["toy"], toy / "runs" / "toy"), [0])
    ran = {path.parent.name for path in (toy / "runs" / "toy").glob("*/job.json")}
    assert ran == {job.name for job in jobs} and len(ran) == len(jobs)
    shared = [name for name, claim in CLAIMS.items() if any(
        job.name == "finetune-V2-labels_5-seed0" for jobs in claim.cells(Plan(BUDGETS["toy"], toy), 0).values() for job in jobs.values()
    )]  # fmt: skip
    assert shared == ["1", "2", "4", "5", "6", "7", "8", "labels"]
    kept = {path.parent.name for path in (toy / "runs" / "toy").glob("pretrain-*/checkpoint-*.pth")}
    assert kept == {"pretrain-V1-seed0", "pretrain-V2-seed0"}  # whose course is looked at


@pytest.mark.slow
def test_what_has_finished_is_not_run_again(toy, monkeypatch, capsys):
    monkeypatch.setattr(plumbing_jobs, "Running", None)
    run(toy)
    capsys.readouterr()
    run(toy, "--dry_run")
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("finished") for line in lines[:-2]) and "about 0s on one core" in lines[-2]


@pytest.mark.slow
def test_a_job_that_was_run_with_other_flags_is_not_taken_for_this_one(toy, tmp_path, monkeypatch):
    monkeypatch.setitem(BUDGETS["toy"], "pretrain", BUDGETS["toy"]["pretrain"] | {"epochs": 1})
    with pytest.raises(UserError, match="6 jobs.*other flags.*delete them"):
        run(toy, "--claim", "1", "--results", str(tmp_path))
    assert "| 1 |" not in (tmp_path / "README.md").read_text()  # nor is it reported, nor what was fine-tuned from it


@pytest.mark.slow
def test_claims_that_were_not_run_are_listed_as_such(toy, monkeypatch):
    plan = Plan(BUDGETS["toy"], toy / "runs" / "toy")
    done = unique(job for jobs in CLAIMS["6"].cells(plan, 0).values() for job in jobs.values())
    monkeypatch.setattr(Job, "finished", property(lambda job: job in done))
    reproduce.write_results("toy", plan, [0], toy / "partial")
    text = (toy / "partial" / "README.md").read_text()
    missing = next(line for line in text.splitlines() if line.startswith("Not run: "))
    assert {name for name in CLAIMS if CLAIMS[name].title in missing} == CLAIMS.keys() - {"6"}
    assert not (toy / "partial" / "claim_1.csv").exists()
    monkeypatch.setitem(BUDGETS["toy"], "seeds", (0, 1))
    reproduce.write_results("toy", plan, [0], toy / "partial")
    assert "| 6 | GRN is needed in both stages | not yet decided, so far |" in (toy / "partial" / "README.md").read_text()


@pytest.mark.slow
def test_results_of_runs_elsewhere_stay_while_their_settings_do(toy, tmp_path, monkeypatch):
    shutil.copytree(toy / "results", tmp_path / "results")
    nothing_ran = Plan(BUDGETS["toy"], tmp_path / "toy")
    reproduce.write_results("toy", nothing_ran, [0], tmp_path / "results")
    for path in (toy / "results").iterdir():
        assert (tmp_path / "results" / path.name).read_bytes() == path.read_bytes() or path.suffix == ".png"
    monkeypatch.setitem(BUDGETS["toy"], "finetune", BUDGETS["toy"]["finetune"] | {"reprob": 0.1})
    reproduce.write_results("toy", nothing_ran, [0], tmp_path / "results")
    assert "| 6 |" not in (tmp_path / "results" / "README.md").read_text()


@pytest.mark.slow
def test_seeds_of_another_machine_are_added_and_our_own_come_first(toy, tmp_path):
    plan, claim, path = Plan(BUDGETS["toy"], toy / "runs" / "toy"), CLAIMS["6"], tmp_path / "claim_1.csv"  # whatever the claim
    own = reproduce.rows_of_claim(claim, plan, [0], {})
    commands = {cell: plan.command(job) for cell, jobs in claim.cells(plan, 1).items() for job in jobs.values()}
    other = [row | {"seed": 1, "value": "7", "command": commands[row["cell"]].replace(str(toy), "elsewhere")} for row in own]
    reproduce.save_csv(path, [row | {"value": "9"} for row in own] + other[:2] + [other[2] | {"command": "python other.py"}])
    found = reproduce.rows_of_claim(claim, plan, [0, 1], reproduce.rows_elsewhere(tmp_path))
    assert found[:3] == own and [(row["seed"], row["value"]) for row in found[3:]] == [(1, "7"), (1, "7")]


@pytest.mark.slow
def test_only_what_the_tables_lack_is_run_when_that_is_asked_for(toy, tmp_path, capsys):
    shutil.copytree(toy / "results", tmp_path / "results")
    words = ["--missing", "--dry_run", "--output_dir", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    run(toy, *words)
    assert "0 jobs" in capsys.readouterr().out
    path = tmp_path / "results" / "claim_8.csv"
    rows = table(path)
    reproduce.save_csv(path, [row for row in rows if (row["cell"], row["reading"]) != ("30% hidden", "probe")])
    run(toy, *words)
    listed = [line.split()[-1] for line in capsys.readouterr().out.splitlines()[:-2]]
    assert listed == ["pretrain-V2-mask_ratio_0.3-seed0", "probe-V2-mask_ratio_0.3-seed0"]


def test_rows_of_seeds_beyond_the_budgets_stay_in_the_tables(tmp_path):
    plan, claim = Plan(BUDGETS["toy"], tmp_path / "runs"), CLAIMS["6"]
    rows = [
        dict(cell=cell, reading="fine-tuning", seed=seed, value=seed, command=jobs["fine-tuning"].command)
        for seed in (0, 7)
        for cell, jobs in claim.cells(plan, seed).items()
    ]
    reproduce.save_csv(tmp_path / "claim_6.csv", rows)
    reproduce.write_results("toy", plan, [0], tmp_path)
    assert [row["seed"] for row in table(tmp_path / "claim_6.csv")] == ["0"] * 3 + ["7"] * 3


def test_a_table_says_where_its_cells_have_not_the_same_seeds():
    def text(*seeds):
        values = {"sparse": {"probe": {0: 50, 1: 60}}, "leaky": {"probe": dict.fromkeys(seeds, 50)}}
        return "\n".join(reproduce.table_of(CLAIMS["1"], values))

    assert "do not compare" not in text(0, 1)
    assert "do not compare" in text(0) and "do not compare" in text(0, 2)


SCRIPT = """
import pathlib, sys, time
folder = pathlib.Path(sys.argv[1])
with open(folder / "starts.txt", "a") as file:
    print("started", file=file)
if folder.name == "first" and len((folder / "starts.txt").read_text().splitlines()) == 1:
    time.sleep(60)
(folder / "encoder.pth").touch()
"""  # the first job is still at it when the signal comes, and quick when it is run again


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_ends_all_jobs_and_run_again_they_go_on(number, tmp_path, monkeypatch):
    monkeypatch.setattr(plumbing_jobs, "ROOT", tmp_path)
    (tmp_path / "script.py").write_text(SCRIPT)
    first, second = (Job(name, "script", tmp_path / name, (str(tmp_path / name),), "encoder.pth") for name in ("first", "second"))

    def send_when_it_runs():
        while not (first.directory / "starts.txt").exists():
            time.sleep(0.1)
        os.kill(os.getpid(), number)

    Thread(target=send_when_it_runs).start()
    before = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_all([first, second], 1)
    assert time.monotonic() - before < 30 and first.record["finished"] is False and not second.directory.exists()
    seconds = first.record["seconds"]
    run_all([first, second], 1)
    assert first.finished and second.finished and first.record["seconds"] > seconds > 0
    starts = [len((job.directory / "starts.txt").read_text().splitlines()) for job in (first, second)]
    run_all([first, second], 1)  # nothing is left to do
    assert starts == [2, 1] == [len((job.directory / "starts.txt").read_text().splitlines()) for job in (first, second)]


def test_jobs_run_side_by_side_and_a_failure_stops_only_what_needs_it(tmp_path, capsys):
    def job(name, argv, *needs):
        return Job(name, "weights", tmp_path / name, argv, "output.txt", needs)

    good, bad = job("good", ("--help",)), job("bad", ("--nonsense",))
    with pytest.raises(UserError, match=r"2 jobs failed \(bad, after\)"):
        run_all([good, bad, job("after", ("--help",), bad)], 2)
    assert good.finished and not bad.finished and "usage" in good.file.read_text()
    assert not (tmp_path / "after").exists()


# --- the protocol, without running anything


def plans():
    return [pytest.param(Plan(budget, Path("runs")), id=name) for name, budget in BUDGETS.items()]


def flags_of(job: Job) -> dict[str, str]:
    found = {}
    for word in job.argv[job.script == "analyze" :]:
        found |= {(name := word): []} if word.startswith("--") else {name: [*found[name], word]}
    return {name: " ".join(values) for name, values in found.items()}


@pytest.mark.parametrize("plan", plans())
def test_every_job_is_a_command_that_its_script_takes(plan):
    scripts = {"pretrain": pretrain, "finetune": finetune, "analyze": analyze}
    for job in reproduce.jobs_of(CLAIMS, plan, [0]):
        if "--finetune" not in job.argv:  # which reads its file
            args = scripts[job.script].get_args(list(job.argv))
            assert args.output_dir == str(job.directory) and getattr(args, "model", None) == flags_of(job).get("--model")
            assert not (args.data_path and getattr(args, "hold_data", False))  # a folder cannot be held


def test_folders_may_have_spaces_and_the_tables_do_not_tell_where_photographs_lie(tmp_path):
    budget, runs = BUDGETS["photographs"], tmp_path / "my runs"
    plan = Plan(budget | dict(common=budget["common"] | dict(data_path=Path("my photos"))), runs)
    elsewhere = Plan(budget, Path("other"))
    for job, other in zip(*(reproduce.jobs_of(CLAIMS, each, [0]) for each in (plan, elsewhere)), strict=True):
        assert all(word.startswith(str(runs)) for word in job.argv if str(tmp_path) in word)
        assert ("--data_path" in job.argv) == ("my photos" in job.argv) and "photos" not in plan.command(job)
        assert reproduce._settings(plan.command(job)) == reproduce._settings(elsewhere.command(other))


@pytest.mark.parametrize("plan", plans())
def test_no_two_jobs_have_one_directory(plan):
    jobs = reproduce.jobs_of(CLAIMS, plan, [0, 1])
    assert len({job.directory for job in jobs}) == len(jobs)


@pytest.mark.parametrize("plan", plans())
def test_cells_differ_in_what_they_are_named_for_and_in_nothing_else(plan):
    base = plan.pretrain(0)
    for name, value in dict(backend="leaky", mlp_norm="se", mask_ratio=0.3, decoder_depth=4, decoder="unet").items():
        ours, theirs = flags_of(base), flags_of(plan.pretrain(0, **{name: value}))
        assert {key for key in theirs if theirs[key] != ours.get(key)} == {f"--{name}", "--output_dir"}
        assert plan.pretrain(0, **{name: reproduce.BASELINE[name]}) == base
    cells = CLAIMS["2"].cells(plan, 0)
    for version in ("V1", "V2"):
        pair = [flags_of(cells[f"{version} {kind}"]["fine-tuning"]) for kind in ("supervised", "FCMAE")]
        differing = {key for key in pair[0].keys() | pair[1].keys() if pair[0].get(key) != pair[1].get(key)}
        start = {f"--{name}" for name in plan.budget["v1"]} if version == "V1" else set()
        assert differing == {"--scratch", "--finetune", "--output_dir"} | start
        trained = (CLAIMS["2"].cells(plan, 0)[f"{version} {kind}"]["fine-tuning"] for kind in ("supervised", "FCMAE"))
        starts = [flags_of(unique([job])[0]) for job in trained]  # V1 starts alike, whether it is pre-trained or not
        assert all((f"--{name}" in flags) == (version == "V1") for flags in starts for name in plan.budget["v1"])


@pytest.mark.parametrize("plan", plans())
def test_everything_that_a_seed_draws_is_shared_by_the_cells_that_are_compared(plan):
    for claim in CLAIMS.values():
        for jobs in claim.cells(plan, 3).values():
            trained = [part for job in jobs.values() for part in unique([job]) if part.script != "analyze"]
            assert {flags_of(job)["--seed"] for job in trained} == {"3"}


@pytest.mark.parametrize("plan", plans())
def test_with_few_labels_both_arms_take_the_same_steps_on_the_same_images_and_more_with_more_labels(plan):
    cells, steps = CLAIMS["labels"].cells(plan, 1), []
    assert len(cells) == 2 * len(plan.budget["labels"]) + 1
    for labels, epochs in plan.budget["labels"].items():
        pair = [flags_of(cells[f"{name}, {labels} per class"]["fine-tuning"]) for name in ("FCMAE", "supervised")]
        for key in ("--epochs", "--labels_per_class", "--seed", "--batch_size"):
            assert pair[0].get(key) == pair[1].get(key)
        steps.append(epochs * labels)
    assert steps == sorted(steps) and plan.budget["usual"] in plan.budget["labels"]


@pytest.mark.parametrize("budget", [pytest.param(BUDGETS[name], id=name) for name in ("laptop", "photographs", "gpu")])
def test_the_longer_supervised_training_takes_as_long_as_both_stages(budget):
    tuned = budget["labels"][budget["usual"]] * budget["usual"] * budget["classes"] / budget["speed"]["finetune"]
    both = budget["pretrain"]["epochs"] * budget["images"] / budget["speed"]["pretrain"] + tuned
    assert budget["longer"] == pytest.approx(both / tuned, rel=0.2)


def test_time_is_as_measured_or_as_others_of_the_script_took_or_as_the_budget_says(tmp_path):
    def job(name, script, work, seconds=None):
        made = Job(name, script, tmp_path / name, (), "job.json", work=work)
        if seconds:
            made.directory.mkdir()
            (made.directory / "job.json").write_text(json.dumps(dict(argv=[], seconds=seconds, finished=True)))
        return made

    jobs = [job("a", "pretrain", 100, 20), job("b", "pretrain", 300, 20), job("c", "pretrain", 50), job("d", "analyze", 50)]
    assert list(plumbing_jobs.seconds_of(jobs, dict(pretrain=1, analyze=2)).values()) == [20, 20, 5, 25]


def test_the_dry_run_starts_nothing_and_adds_up(tmp_path, capsys):
    plan = Plan(BUDGETS["laptop"], tmp_path / "laptop")
    reproduce.main(
        reproduce.get_args(["--claim", "6", "--seeds", "10", "11", "--dry_run", "--output_dir", str(tmp_path), "--jobs", "2"])
    )
    out = capsys.readouterr().out
    assert not list(tmp_path.iterdir()) and "10 jobs (4 of pretrain.py, 6 of finetune.py)" in out
    seconds = sum(job.work / BUDGETS["laptop"]["speed"][job.script] for job in reproduce.jobs_of(["6"], plan, [10, 11]))
    assert f"about {duration(seconds)} on one core" in out and f"{duration(seconds / 2)} with --jobs 2" in out


WRONG = [["--claim", "12"], ["--budget", "lapto"], ["--seeds", "-1"], ["--budget", "photographs"], ["--data_path", "photos"]]


@pytest.mark.parametrize("words", WRONG)
def test_mistakes_are_one_line(words, capsys):
    with pytest.raises(SystemExit) as stop:
        reproduce.get_args(words)
    assert stop.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1


# --- what counts as a difference


def test_the_table_of_t_is_students():
    for freedom, t in enumerate(reproduce.T, 1):
        x = torch.linspace(0, t, 200_001, dtype=torch.float64)
        density = torch.distributions.StudentT(torch.tensor(float(freedom), dtype=torch.float64)).log_prob(x).exp()
        assert torch.trapezoid(density, x) == pytest.approx(0.475, abs=1e-3)


def difference(*values: float, tie: bool = False, reading: str = "probe", least: float = 0.0) -> Difference:
    return Difference(Expectation("a above b", {"a": 1, "b": -1}, tie), reading, values, least)


def test_a_margin_is_t_times_the_standard_error_of_the_pairs():
    found = difference(1.0, 2.0, 6.0)
    assert found.mean == 3 and found.margin == pytest.approx(4.30 * math.sqrt(7 / 3), rel=1e-2)
    assert difference(1.0).margin == math.inf and difference(1.0).outcome == "open"


def test_equal_cells_are_told_apart_in_one_of_twenty_draws():
    draws = torch.randn(4000, 5, generator=torch.Generator().manual_seed(0)).double().tolist()
    assert sum(difference(*draw).outcome != "open" for draw in draws) / 4000 == pytest.approx(0.05, abs=0.012)


@pytest.mark.parametrize(
    ("values", "tie", "outcome"),
    [
        ([4.0, 4.1, 4.2], False, "holds"),
        ([-4.0, -4.1, -4.2], False, "fails"),
        ([4.0, -4.1, 0.2], False, "open"),
        ([0.1, -0.1, 0.2], True, "holds"),
        ([1.1, 3.1, 1.9], True, "open"),  # some 2 points, at the bound
        ([0.1, 0.2, 3.9], True, "open"),
        ([-6.0, -6.1, -6.2], True, "fails"),
        ([4.0], False, "open"),
    ],
)
def test_an_outcome_follows_from_the_interval(values, tie, outcome):
    assert difference(*values, tie=tie).outcome == outcome


@pytest.mark.parametrize(
    ("values", "outcome"), [([0.4, 0.5, 0.6], "holds"), ([0.4, -0.5, 0.1], "fails"), ([3.0, -0.5, 1.5], "open")]
)
def test_a_difference_that_is_certainly_smaller_than_counts_fails_unless_it_is_certainly_above_zero(values, outcome):
    assert difference(*values, least=2.0).outcome == outcome
    assert difference(*values).outcome == outcome.replace("fails", "open")


def test_half_the_papers_difference_counts_or_what_the_reading_says():
    values = {"a": {"probe": {0: 1.0}, "collapse": {0: 1.0}}, "b": {"probe": {0: 0.0}, "collapse": {0: 0.0}}}
    for paper, least in (({"a": 84.0, "b": 81.0}, {"probe": 1.5, "collapse": 1.5}), ({}, {"probe": 2.0, "collapse": 0.02})):
        claim = Claim("", None, lambda cells: reproduce.above("a", ["b"]), paper)
        assert {each.reading: each.least for each in reproduce.differences(claim, values)} == least


@pytest.mark.parametrize(
    ("readings", "verdict"),
    [
        ({"probe": "holds", "fine-tuning": "open"}, "it holds here"),
        ({"probe": "holds", "fine-tuning": "holds"}, "it holds here"),
        ({"probe": "holds", "fine-tuning": "fails"}, "not yet decided"),
        ({"probe": "fails", "fine-tuning": "open"}, "it fails here"),
        ({"probe": "open"}, "not yet decided"),
        ({"probe": "holds open"}, "not yet decided"),
        ({"probe": "holds open fails", "fine-tuning": "open"}, "it fails here"),
    ],
)
def test_verdicts_follow_the_rule(readings, verdict):
    values = {"holds": (4.0, 4.1, 4.2), "fails": (-4.0, -4.1, -4.2), "open": (4.0, -4.1, 0.2)}
    found = [difference(*values[each], reading=name) for name, each in readings.items() for each in each.split()]
    assert reproduce.judge(found, max(len(each.split()) for each in readings.values())) == verdict


def test_a_reading_that_cannot_make_all_comparisons_may_fail_a_claim_but_not_hold_it():
    for values, verdict in (((4.0, 4.1, 4.2), "not yet decided"), ((-4.0, -4.1, -4.2), "it fails here")):
        assert reproduce.judge([difference(*values)], 3) == verdict


def test_seeds_that_have_both_cells_are_compared_in_pairs():
    claim = Claim("", None, lambda cells: [Expectation("a above b", {"a": 1, "b": -1})], {})
    values = {"a": {"probe": {0: 50.0, 1: 70.0, 2: 60.0}}, "b": {"probe": {0: 49.0, 2: 58.0}, "fine-tuning": {0: 1.0}}}
    (found,) = reproduce.differences(claim, values)
    assert found.reading == "probe" and found.values == (1.0, 2.0)


@pytest.mark.parametrize(
    ("mean", "tie", "least"), [(0.5, False, 0), (-1.0, False, 0), (0.2, False, 1), (0.8, False, 1), (1.0, True, 0), (3.0, True, 0)]
)
def test_as_many_seeds_as_are_said_to_decide_it_do_so_and_one_fewer_does_not(mean, tie, least):
    def with_seeds(n):  # of the same mean and spread
        draws = torch.randn(n, generator=torch.Generator().manual_seed(0)).double()
        return difference(*((draws - draws.mean()) / draws.std() * 2 + mean).tolist(), tie=tie, least=least)

    few = with_seeds(5)
    assert few.outcome == "open" and few.seeds_to_decide > 6
    assert with_seeds(few.seeds_to_decide).outcome != "open" and with_seeds(few.seeds_to_decide - 1).outcome == "open"
    assert difference(1.0).seeds_to_decide == math.inf


# --- finetune.py --holdout


def labelled(count: int) -> Images:
    return Images(list(range(count)), [i % 3 for i in range(count)], ["a", "b", "c"], None, None)


def test_held_out_images_are_a_share_of_every_class_and_are_not_trained_on():
    rest, held = data.split_holdout(labelled(30), 0.2)
    assert Counter(held.labels) == {0: 2, 1: 2, 2: 2} and set(rest.items) | set(held.items) == set(range(30))
    assert not set(rest.items) & set(held.items)
    with pytest.raises(UserError, match="none of any class"):
        data.split_holdout(labelled(6), 0.1)


@pytest.mark.slow
def test_tuning_never_opens_the_validation_images(toy, tmp_path, monkeypatch):
    opened = []
    load = finetune.load_images
    monkeypatch.setattr(finetune, "load_images", lambda *args: opened.append(args[2]) or load(*args))
    words = flags_of(CLAIMS["2"].cells(Plan(BUDGETS["toy"], toy / "runs" / "toy"), 0)["V2 supervised"]["fine-tuning"])
    words |= {"--output_dir": str(tmp_path), "--holdout": "0.2", "--labels_per_class": "4"}
    for seed in ("0", "1"):
        args = finetune.get_args([word for pair in (words | {"--seed": seed}).items() for word in pair])
        held = finetune.load_labelled(args)[1]
        assert opened == ["train"] * (int(seed) + 1) and sorted(held.items) == sorted(finetune.load_labelled(args)[1].items)
        opened.pop()
