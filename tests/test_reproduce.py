"""Claims about reproduce.py, by running all of it at the toy budget, which takes a minute: `pytest -m slow`."""

import csv
import json
import math
import shlex
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image

import data
import finetune
import pretrain
import reproduce
from data import TEXTURES, Images, draw_images
from plumbing.log import duration, read_log
from plumbing.script import UserError
from reproduce import BUDGETS, CLAIMS, Expectation, Job, Plan, contrast, judge, unique

# Fourteen drawn pictures of two classes; the numbers mean nothing.
BUDGETS["toy"] = dict(
    about="fourteen embedded pictures, for testing this file; its numbers mean nothing",
    seeds=1, size="atto", images=10, val_images=4, classes=2, measure_images=4,
    common=dict(data_path="toy-data", input_size=32, stem_stride=1, batch_size=4, num_workers=0),
    pretrain=dict(epochs=1, blr=0.1, decoder_embed_dim=32, warmup_epochs=0),
    finetune=dict(epochs=1, aa="none", reprob=0.0, input_size=16, warmup_epochs=0),
    recipes={"plain": dict(blr=0.1), "slow": dict(blr=0.05), "mixed": dict(blr=0.1, mixup=0.8)},
    labels={2: 2},
    mask_ratios=(0.3, 0.6), decoder_depths=(1, 2), decoder_widths=(16, 32),
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
    reproduce.main(
        reproduce.get_args(["--budget", "toy", "--output_dir", str(folder / "runs"), "--results", str(folder / "results"), *words])
    )


def table(path: Path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    """Everything, once: the runs and the results."""
    folder = tmp_path_factory.mktemp("toy")
    draw_toy_data(folder / "runs/toy/toy-data")
    run(folder)
    return folder


# --- all of it


@pytest.mark.slow
def test_every_claim_gets_a_table_and_a_verdict(toy):
    readme = (toy / "results" / "README.md").read_text()
    assert "All claims were run." in readme
    for name, claim in CLAIMS.items():
        assert claim.title in readme
        rows = table(toy / "results" / f"claim_{name}.csv")
        assert {row["cell"] for row in rows} == set(claim.jobs(Plan(BUDGETS["toy"], toy, {}), 0))
        assert all(math.isfinite(float(row["mean"])) for row in rows)
    assert readme.count("not distinguishable at this scale |") == len(CLAIMS)  # one seed shows no difference


@pytest.mark.slow
def test_a_number_comes_with_its_command_commit_hardware_versions_and_time(toy):
    for row in table(toy / "results" / "claim_2.csv"):
        assert row["commit"] and "core" in row["hardware"] + "cores" and f"torch {torch.__version__}" in row["versions"]
        assert float(row["finetune_minutes"]) > 0 and ("FCMAE" not in row["cell"] or float(row["pretrain_minutes"]) > 0)
        commands = row["command"].split(" && ")
        assert len(commands) == (2 if "FCMAE" in row["cell"] else 1)
        last = finetune.get_args(shlex.split(commands[-1])[2:])
        logged = [record["val_top1"] for record in read_log(Path(last.output_dir)) if "val_top1" in record]
        assert float(row["mean"]) == pytest.approx(logged[-1], rel=1e-5) and row["n"] == "1"


@pytest.mark.slow
def test_jobs_shared_between_claims_run_once(toy):
    jobs = [job for claim in CLAIMS.values() for job in claim.jobs(Plan(BUDGETS["toy"], toy / "runs" / "toy", {}), 0).values()]
    ran = {path.parent.name for path in (toy / "runs" / "toy").glob("*/job.json")}
    assert ran == {job.name for job in unique(jobs)}
    baseline = [job for job in jobs if job.name == "finetune-V2-recipe_plain-seed0"]
    assert len(baseline) >= 8  # claims 1, 2, 4, 5, 6, 7, 8 and labels
    assert "finetune-V2-recipe_plain-seed0" in ran


@pytest.mark.slow
def test_figures_are_drawn_for_claims_2_3_8_and_labels(toy):
    assert {path.name for path in (toy / "results").glob("*.png")} == {f"claim_{name}.png" for name in ("2", "3", "8", "labels")}
    for path in (toy / "results").glob("*.png"):
        assert min(Image.open(path).size) > 400


@pytest.mark.slow
def test_what_has_finished_is_not_run_again(toy, monkeypatch, capsys):
    monkeypatch.setattr(reproduce, "run_here", None)
    run(toy)
    capsys.readouterr()
    run(toy, "--dry_run")
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("finished") for line in lines[:-2]) and "about 0s on one core" in lines[-2]


@pytest.mark.slow
def test_a_job_that_was_run_with_other_flags_is_not_taken_for_this_one(toy, tmp_path, monkeypatch):
    monkeypatch.setitem(BUDGETS["toy"], "pretrain", BUDGETS["toy"]["pretrain"] | {"epochs": 2})
    with pytest.raises(UserError, match="6 jobs.*other flags.*delete them"):
        run(toy, "--claim", "1", "--results", str(tmp_path))
    assert "| 1 |" not in (tmp_path / "README.md").read_text()  # nor is it reported, nor what was fine-tuned from it


@pytest.mark.slow
def test_claims_that_were_not_run_are_listed_as_such(toy, monkeypatch):
    plan = Plan(BUDGETS["toy"], toy / "runs" / "toy", {})
    monkeypatch.setattr(Job, "finished", property(lambda job: job in unique(CLAIMS["2"].jobs(plan, 0).values())))
    reproduce.write_results("toy", plan, 1, toy / "partial")
    text = (toy / "partial" / "README.md").read_text()
    missing = next(line for line in text.splitlines() if line.startswith("Not run: "))
    assert {name for name in CLAIMS if CLAIMS[name].title in missing} == {"1", "3", "4", "6", "7", "8", "9"}
    assert not (toy / "partial" / "claim_1.csv").exists()  # one of its three cells has finished, and compares with nothing
    assert "| 5 | What stands in GRN's place | not distinguishable at this scale, so far |" in text


@pytest.mark.slow
def test_results_of_runs_elsewhere_stay_while_their_settings_do(toy, tmp_path, monkeypatch):
    shutil.copytree(toy / "results", tmp_path / "results")
    nothing_ran = Plan(BUDGETS["toy"], tmp_path / "toy", {})
    reproduce.write_results("toy", nothing_ran, 1, tmp_path / "results")
    for path in (toy / "results").iterdir():
        assert (tmp_path / "results" / path.name).read_bytes() == path.read_bytes() or path.suffix == ".png"
    monkeypatch.setitem(BUDGETS["toy"], "finetune", BUDGETS["toy"]["finetune"] | {"epochs": 2})
    reproduce.write_results("toy", nothing_ran, 1, tmp_path / "results")
    assert "| 2 |" not in (tmp_path / "results" / "README.md").read_text()


@pytest.mark.slow
def test_the_table_with_more_runs_behind_it_is_kept_whole(toy, tmp_path):
    plan, path = Plan(BUDGETS["toy"], toy / "runs" / "toy", {}), tmp_path / "claim_2.csv"
    own = reproduce.table_of(CLAIMS["2"], reproduce.gather(CLAIMS["2"], plan, 1))
    for runs, kept in ((3, [3, 3]), (1, [1, 1, 1, 1])):  # two cells of an earlier table, against four of one seed
        reproduce.save_csv(path, [row | {"n": runs} for row in own[:2]])
        assert [row["n"] for row in reproduce.fuller_table(own, path, CLAIMS["2"], plan)] == kept
    reproduce.save_csv(path, [row | {"n": 9, "command": row["command"].replace("--epochs 1", "--epochs 2")} for row in own])
    assert reproduce.fuller_table(own, path, CLAIMS["2"], plan) is own


def test_a_stopped_reproduction_goes_on_where_it_was(tmp_path, monkeypatch):
    ran = Counter()
    draw_toy_data(tmp_path / "runs/toy/toy-data")

    def counting(script, fail_at):
        original = script.main

        def main(args):
            ran[Path(args.output_dir).name] += 1
            if sum(ran.values()) == fail_at:
                raise KeyboardInterrupt
            original(args)

        return main

    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "main", counting(pretrain, 2))
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, "--claim", "6")
    stopped = tmp_path / "runs" / "toy" / "pretrain-V2-mlp_norm_none-seed0" / "job.json"
    assert set(ran.values()) == {1} and len(ran) == 2 and not json.loads(stopped.read_text())["finished"]
    before = json.loads(stopped.read_text())["seconds"]
    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "main", counting(pretrain, 0))
        run(tmp_path, "--claim", "6")
    assert ran == {"pretrain-V2-seed0": 1, "pretrain-V2-mlp_norm_none-seed0": 2}
    assert json.loads(stopped.read_text())["finished"] and json.loads(stopped.read_text())["seconds"] > before
    assert len(table(tmp_path / "results" / "claim_6.csv")) == 3


def test_jobs_run_side_by_side_and_a_failure_stops_only_what_needs_it(tmp_path, capsys):
    def job(name, argv, *needs):
        return Job(name, "weights", tmp_path / name, argv, "output.txt", needs)

    good, bad = job("good", ("--help",)), job("bad", ("--nonsense",))
    with pytest.raises(UserError, match=r"2 jobs failed \(bad, after\)"):
        reproduce.run_all([good, bad, job("after", ("--help",), bad)], 2)
    assert good.finished and not bad.finished and "usage" in Path(good.file).read_text()
    assert not (tmp_path / "after").exists()


@pytest.mark.slow
def test_tuning_takes_the_best_held_out_recipe_of_each_arm_and_runs_use_it(toy, capsys):
    run(toy, "--tune")
    rows = table(toy / "results" / "tuning.csv")
    try:
        arms = {row["arm"] for row in rows}
        assert arms == {"V1 FCMAE", "V2 FCMAE", "V1 supervised", "V2 supervised"}
        for arm in arms:
            tried = [row for row in rows if row["arm"] == arm]
            assert {row["recipe"] for row in tried} == set(BUDGETS["toy"]["recipes"])  # the same effort for each
            (chosen,) = [row for row in tried if row["chosen"] == "1"]
            assert float(chosen["held_out_top1"]) == max(float(row["held_out_top1"]) for row in tried)
            assert all("--holdout 0.2" in row["command"] for row in tried)
        best = {row["arm"]: row["recipe"] for row in rows if row["chosen"] == "1"}
        capsys.readouterr()
        run(toy, "--dry_run", "--claim", "2")
        listed = capsys.readouterr().out
        assert f"finetune-V1-recipe_{best['V1 FCMAE']}-" in listed and f"scratch-V2-recipe_{best['V2 supervised']}-" in listed
    finally:
        (toy / "results" / "tuning.csv").unlink()


# --- the protocol, without running anything


def plans():
    return [pytest.param(Plan(budget, Path("runs"), {}), id=name) for name, budget in BUDGETS.items()]


def flags_of(job: Job) -> dict[str, str]:
    return dict(zip(job.argv[::2], job.argv[1::2]))


@pytest.mark.parametrize("plan", plans())
def test_every_job_is_a_command_that_its_script_takes(plan):
    scripts = {"pretrain": pretrain, "finetune": finetune}
    for claim in CLAIMS.values():
        for job in unique(claim.jobs(plan, 0).values()):
            if job.script != "analyze" and "--finetune" not in job.argv:  # which reads its file
                args = scripts[job.script].get_args(list(job.argv))
                assert args.output_dir == str(job.directory) and args.model == flags_of(job)["--model"]


@pytest.mark.parametrize("plan", plans())
def test_no_two_jobs_have_one_directory(plan):
    jobs = unique(job for claim in CLAIMS.values() for seed in (0, 1) for job in claim.jobs(plan, seed).values())
    jobs = unique([*jobs, *reproduce.tuning_jobs(plan).values()])
    assert len({job.directory for job in jobs}) == len(jobs)


@pytest.mark.parametrize("plan", plans())
def test_cells_differ_in_what_they_are_named_for_and_in_nothing_else(plan):
    base = plan.pretrain(0)
    for name, value in dict(backend="leaky", mlp_norm="se", mask_ratio=0.3, decoder_depth=4, decoder="unet").items():
        ours, theirs = flags_of(base), flags_of(plan.pretrain(0, **{name: value}))
        assert {key for key in theirs if theirs[key] != ours.get(key)} == {f"--{name}", "--output_dir"}
        assert plan.pretrain(0, **{name: reproduce.BASELINE[name]}) == base
    cells = CLAIMS["2"].jobs(plan, 0)
    for version in ("V1", "V2"):
        pair = [flags_of(cells[f"{version} {kind}"]) for kind in ("supervised", "FCMAE")]
        differing = {key for key in pair[0].keys() | pair[1].keys() if pair[0].get(key) != pair[1].get(key)}
        assert differing == {"--scratch", "--finetune", "--output_dir"}


@pytest.mark.parametrize("plan", plans())
def test_with_few_labels_both_arms_take_the_same_steps_on_the_same_images(plan):
    cells = CLAIMS["labels"].jobs(plan, 1)
    assert len(cells) == 2 * (len(plan.budget["labels"]) + 1)
    for cell, job in cells.items():
        if cell.startswith("FCMAE"):
            pair = [flags_of(job), flags_of(cells[cell.replace("FCMAE", "supervised")])]
            for key in ("--epochs", "--labels_per_class", "--seed", "--batch_size"):
                assert pair[0].get(key) == pair[1].get(key)
    steps = []
    for job in cells.values():
        flags = flags_of(job)
        per_class = int(flags.get("--labels_per_class", plan.budget["images"] // plan.budget["classes"]))
        images, batch = per_class * plan.budget["classes"], int(flags["--batch_size"])
        steps.append(int(flags["--epochs"]) * max(1, images // batch))
    assert max(steps) <= 1.02 * min(steps)


def test_the_dry_run_starts_nothing_and_adds_up(tmp_path, capsys):
    plan = Plan(BUDGETS["laptop"], tmp_path / "laptop", {})
    reproduce.main(reproduce.get_args(["--claim", "6", "--seeds", "2", "--dry_run", "--output_dir", str(tmp_path), "--jobs", "2"]))
    out = capsys.readouterr().out
    assert not list(tmp_path.iterdir()) and "10 jobs (4 of pretrain.py, 6 of finetune.py)" in out
    jobs = unique(job for seed in (0, 1) for job in CLAIMS["6"].jobs(plan, seed).values())
    seconds = sum(job.work / BUDGETS["laptop"]["speed"][job.script] for job in jobs)
    assert f"about {duration(seconds)} on one core" in out and f"{duration(seconds / 2)} with --jobs 2" in out


@pytest.mark.parametrize("words", [["--claim", "12"], ["--budget", "lapto"], ["--seeds", "0"]])
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


def test_a_margin_is_t_times_the_pooled_standard_error():
    estimate, margin = contrast({"a": [1.0, 2.0, 3.0], "b": [4.0, 6.0, 8.0]}, {"a": 1, "b": -1})
    assert estimate == -4 and margin == pytest.approx(2.78 * math.sqrt((1 + 4) / 2 * (1 / 3 + 1 / 3)))
    assert contrast({"a": [1.0], "b": [2.0]}, {"a": 1, "b": -1}) == (-1, math.inf)


def test_equal_cells_are_told_apart_in_one_of_twenty_draws():
    draws = torch.randn(4000, 4, 3, generator=torch.Generator().manual_seed(0)).double().tolist()
    weights = {"a": 1, "b": -1, "c": -1, "d": 1}
    found = [contrast(dict(zip("abcd", draw)), weights) for draw in draws]
    assert sum(abs(estimate) > margin for estimate, margin in found) / 4000 == pytest.approx(0.05, abs=0.012)


@pytest.mark.parametrize(
    ("a", "b", "tie", "verdict"),
    [
        ([9.0, 9.1, 9.2], [5.0, 5.1, 5.2], False, "reproduced"),
        ([5.0, 5.1, 5.2], [9.0, 9.1, 9.2], False, "not reproduced"),
        ([5.0, 5.1, 5.2], [5.1, 5.2, 5.3], False, "not distinguishable at this scale"),
        ([5.0, 5.1, 5.2], [5.1, 5.2, 5.3], True, "reproduced"),
        ([5.0, 5.1, 5.2], [9.0, 9.1, 9.2], True, "not reproduced"),
        ([9.0], [5.0], False, "not distinguishable at this scale"),
        ([5.0], [5.0], True, "not distinguishable at this scale"),
        ([9.0, 9.1, 9.2], [], False, "not distinguishable at this scale"),
    ],
)
def test_verdicts_follow_the_rule(a, b, tie, verdict):
    assert judge([Expectation("a above b", {"a": 1, "b": -1}, tie)], {"a": a, "b": b})[0] == verdict


def test_one_contradiction_outweighs_what_holds():
    values = {"a": [9.0, 9.1], "b": [5.0, 5.1], "c": [1.0, 1.1]}
    expectations = [Expectation("a above b", {"a": 1, "b": -1}), Expectation("c above b", {"c": 1, "b": -1})]
    verdict, lines = judge(expectations, values)
    assert verdict == "not reproduced" and ": yes" in lines[0] and ": no" in lines[1]


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
    words = flags_of(CLAIMS["2"].jobs(Plan(BUDGETS["toy"], toy / "runs" / "toy", {}), 0)["V2 supervised"])
    words |= {"--output_dir": str(tmp_path), "--holdout": "0.2"}
    for seed in ("0", "1"):
        args = finetune.get_args([word for pair in (words | {"--seed": seed}).items() for word in pair])
        held = finetune.load_labelled(args)[1]
        assert opened == ["train"] * (int(seed) + 1) and sorted(held.items) == sorted(finetune.load_labelled(args)[1].items)
        opened.pop()
