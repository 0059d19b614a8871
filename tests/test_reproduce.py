"""Claims about experiments/reproduce.py."""

import importlib
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch

from experiments import reproduce
from experiments.reproduce import BUDGETS, CLAIMS, METRICS, Claim, Condition, Difference, Job, Plan, unique
from plumbing.files import UserError

SEEN, NOT_SEEN, OPPOSITE = "seen here", "not seen at this scale", "opposite here"
RESULTS = Path(__file__).parent.parent / "results"
TOY = dict(
    seeds=[0, 1], epochs=[1, 2], common="--data_set embedded --embedded_images 50 50 --input_size 32 --stem_stride 1",
    pretrain="--epochs 2 --save_ckpt_freq 1 --batch_size 10 --decoder_embed_dim 16 --lr 0.001",
    finetune="--batch_size 10 --labels_per_class 2 --epochs 1 --lr 0.001", measure="--num_images 10",
    probe="--bank_images 50 --num_images 50",
)  # fmt: skip


@pytest.mark.parametrize("name", BUDGETS)
def test_commands_are_those_of_the_scripts_and_only_equal_ones_share_a_folder(name):
    plan = Plan(name, Path("my runs"))
    keys = plan.keys(plan.claims, 3) | plan.keys(plan.claims, 4)
    jobs = unique(job for job, _ in keys.values())
    assert len({job.output.parent for job in jobs}) == len(jobs)
    for job, (script, *argv) in ((job, shlex.split(job.command)) for job in jobs):
        if script != "analyze.py" and "--finetune" not in argv:  # which read their files
            args = importlib.import_module(script[:-3]).get_args(argv)
            assert job.output in [Path(args.output_dir, f"checkpoint-{end}.pth") for end in ("best", args.epochs)]
        assert "--seed" in argv or (script == "analyze.py" and "--untrained" not in argv)
    for (*_, seed), (job, _) in keys.items():  # everything that a seed draws is shared
        assert {str(seed)} == {n for part in unique([job]) for n in re.findall(r"--seed (\d+)", part.command)}


def flags_of(job: Job) -> set[tuple[str, str]]:
    return set(re.findall(r"--(\w+) ([^-]\S*(?: [^-]\S*)*)", job.command))


def test_conditions_differ_in_what_they_are_named_for_and_in_nothing_else():
    plan, own = Plan("laptop", Path("r")), {"output_dir", "finetune", "checkpoint", "save_ckpt_num"}
    for condition in (c for claim in plan.claims.values() for c in claim.conditions.values()):
        different, usual = set(), Condition(condition.version, metrics=condition.metrics)
        for command in condition.metrics.values():
            jobs = (unique([plan.job(command, 0, c)]) for c in (condition, usual))
            for ours, theirs in (map(flags_of, pair) for pair in zip(*jobs, strict=True)):
                different |= {name for name, _ in ours ^ theirs} - own
        assert different == set(re.findall(r"--(\w+)", condition.changes + condition.then))
    ours, theirs = (flags_of(plan.job(name, 0, Condition("V1"))) for name in ("supervised", "finetune"))
    assert {name for name, _ in ours ^ theirs} == {"scratch", "finetune", "output_dir"}


SCRIPT = """import os, pathlib, sys, time; folder = pathlib.Path(sys.argv[-1])
print(*sys.argv, file=open(folder / "starts.txt", "a"), flush=True)
if folder.name == "slow" and len((folder / "starts.txt").read_text().splitlines()) == 1:
    os.kill(os.getppid(), 15)
    time.sleep(60)
(folder / ("done" if folder.name != "bad" else "not")).touch()
"""


def test_done_jobs_are_left_alone_a_signal_or_a_failure_ends_all_and_run_again_they_go_on(tmp_path, monkeypatch):
    def job(name, *needs):
        return Job(f"script.py DIR {(tmp_path / name).as_posix()}", tmp_path / name / "done", needs)

    def starts(name):
        return (tmp_path / name / "starts.txt").read_text() if (tmp_path / name).exists() else ""

    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    (tmp_path / "script.py").write_text(SCRIPT)
    jobs = [job("first"), job("slow"), job("after", job("slow"))]
    with pytest.raises(KeyboardInterrupt):
        reproduce.run_all(jobs, 1, "my photos")
    assert "my photos" in starts("first") and not jobs[1].output.exists() and not starts("after")
    reproduce.run_all(jobs, 2, "x")
    with pytest.raises(UserError, match=r"output\.txt"):
        reproduce.run_all([job("bad"), job("never", job("bad")), *jobs], 1, "x")
    assert [len(starts(name).splitlines()) for name in ("first", "slow", "after", "bad", "never")] == [1, 2, 1, 1, 0]


def test_numbers_are_those_of_the_network_the_tensor_and_the_layers_that_are_named(tmp_path):
    def networks(text, tensor="after GRN"):
        job.output.write_text(text)
        return reproduce.networks_of(job, tensor)

    job = Job("", tmp_path / "x.csv")
    text = 'checkpoint,features,accuracy\na,stage 4,1\na,"stages 3, 4",2\nb,stage 4,3\nb,"stages 3, 4",4\n'
    assert len(networks(text)) == 2
    assert reproduce.rows_for(("2", "V2 FCMAE", "probe", 0), job, Condition(), {})[0]["value"] == "4"
    text = "checkpoint,layer,class_selectivity_index\na,l5,nan\n" + "".join(f"a,l{i},{i}\n" for i in range(6))
    assert METRICS["selectivity"].of(networks(text)["a"]) == 3.5  # mean over channels, l5 comes first
    text = "checkpoint,block,quantity,percentile_5,percentile_25,percentile_95\na,b,gamma,1,2,9\na,b,beta,0,0,0\n"
    assert METRICS["gamma"].of(networks(text)["a"]) == 8
    lines = ["l,after GELU,1", "m,after GELU,2", "l,after GRN,3", "m,after GRN,5"]
    text = "checkpoint,layer,tensor,cosine_distance_mean\n" + "".join(f"a,{line}\n" for line in lines)
    for tensor, means in {"after GRN": [4, 5], "after GELU": [1.5, 2]}.items():
        assert [METRICS[f"collapse{part}"].of(networks(text, tensor)["a"]) for part in ("", ", last block")] == means
    records = dict(epoch=0.5, loss=4), dict(epoch=1.0, loss=2), dict(epoch=1.0, val_top1=50), dict(epoch=2.0, loss=1)
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, records)))
    job = Job("", tmp_path / "checkpoint-2.pth")
    job.output.touch()
    assert METRICS["fine-tuning"].of(reproduce.networks_of(job)[1]) == 50
    rows = reproduce.rows_for(("course", "V2", "loss", 12), job, Condition(), {})
    row = dict(condition="V2", metric="loss", seed="12", block=0)  # as in rows on file
    assert [rows[0], rows[2]] == [row | dict(epoch=1, value="3"), row | dict(epoch=2, value="1")]


def difference(*values: float, tie: bool = False, metric: str = "probe", least: float = 0.0) -> Difference:
    return Difference("a level with b" if tie else "a above b", metric, list(values), least)


def test_intervals_are_students():
    for freedom, t in enumerate(reproduce.T, 1):
        x = torch.linspace(0, t, 200_001, dtype=torch.float64)
        density = torch.distributions.StudentT(torch.tensor(float(freedom), dtype=torch.float64)).log_prob(x).exp()
        assert torch.trapezoid(density, x) == pytest.approx(0.475, abs=1e-3)
    assert difference(1.0, 2.0, 6.0).judged()[:2] == (3, pytest.approx(4.30 * (7 / 3) ** 0.5, rel=1e-2))
    assert difference(1.0).judged()[2:] == (NOT_SEEN, False)


# fmt: off
OUTCOMES = [  # values of three seeds, a tie or the least that counts, the word, whether it decides against a claim
    ([4, 4.1, 4.2], {}, SEEN, False), ([-4, -4.1, -4.2], {}, OPPOSITE, True), ([4, -4.1, 0.2], {}, NOT_SEEN, False),
    ([0.1, -0.1, 0.2], dict(tie=True), SEEN, False), ([1.1, 3.1, 1.9], dict(tie=True), NOT_SEEN, False),
    ([0.1, 0.2, 3.9], dict(tie=True), NOT_SEEN, False), ([-6.0, -6.1, -6.2], dict(tie=True), OPPOSITE, True),
    ([0.4, 0.5, 0.6], dict(least=2.0), SEEN, False), ([0.4, -0.5, 0.1], dict(least=2.0), NOT_SEEN, True),
    ([3.0, -0.5, 1.5], dict(least=2.0), NOT_SEEN, False)]
VERDICTS = [  # comparisons by probe and by fine-tuning, as in VALUES
    ("s", "n", SEEN), ("s", "s", SEEN), ("s", "o", NOT_SEEN), ("o", "n", OPPOSITE), ("l", "n", NOT_SEEN),
    ("n", "", NOT_SEEN), ("sl", "ss", NOT_SEEN), ("sn", "", NOT_SEEN), ("sno", "n", OPPOSITE), ("lo", "nn", OPPOSITE)]
VALUES = {"s": (4.0, 4.1, 4.2), "o": (-4.0, -4.1, -4.2), "n": (9.0, -8.1, 1.2), "l": (0.1, -0.1, 0.0)}
# fmt: on


def test_a_word_follows_from_the_interval_and_one_metric_decides_unless_another_decides_otherwise():
    for values, more, *outcome in OUTCOMES:
        assert [*difference(*values, **more).judged()[2:]] == outcome, values
    for probe, tuned, word in VERDICTS:
        parts = [(name, k) for name, part in (("probe", probe), ("fine-tuning", tuned)) for k in part]
        differences = [difference(*VALUES[k], metric=name, least=1.0) for name, k in parts]
        assert reproduce.verdict(differences, len(probe))[0] == word, (probe, tuned)
        assert reproduce.verdict(differences, 9)[0] != SEEN  # where comparisons are missing
    assert reproduce.verdict([difference(*VALUES["o"])], 3)[0] == OPPOSITE


def test_pairs_of_seeds_are_compared_as_the_paper_leads_one_to_expect():
    paper = {name: Condition(paper=number) for name, number in zip("abcd", (84.6, 84.3, 83.7, 83.8))}
    values = {name: {"probe": {0: k, 1: 2.0 * k, 2 + k: 9.0}, "loss": {0: 1.0}} for k, name in enumerate("dcba")}
    one, two = reproduce.compare(Claim("", ["a - b above c - d", "a level with c"], paper), values)
    assert (one.metric, one.values, two.values) == ("probe", [0.0, 0.0], [2.0, 4.0])
    assert (one.paper, one.least, two.paper) == (pytest.approx(0.4), pytest.approx(0.2), pytest.approx(0.9))
    claim = Claim("", ["a above b"], dict.fromkeys("ab", Condition()))
    values = [{key: {metric: {0: 1.0}} for key in "ab"} for metric in ("probe", "collapse")]
    assert [reproduce.compare(claim, part)[0].least for part in values] == [2.0, 0.02]
    assert CLAIMS["9"].expect == CLAIMS["night 9"].expect == ["V1 FCMAE above V2 FCMAE"]
    assert [CLAIMS[f"night 3{part}"].expect[0][:9] for part in ("", " before GRN")] == ["V2 after ", "V2 before"]


def test_the_pages_follow_from_the_rows_on_file_and_keep_what_is_by_hand(tmp_path):
    shutil.copytree(RESULTS, tmp_path / "results")
    for folder, name in (("", "laptop"), ("night", "night"), ("photographs", "photographs")):
        reproduce.write_results(Plan(name, tmp_path), [], tmp_path / "results" / folder)
        for path in (RESULTS / folder).glob("*.[cm][sd]*"):
            assert (tmp_path / "results" / folder / path.name).read_bytes() == path.read_bytes()


def test_dry_runs_list_the_commands_that_are_asked_for_and_lacking(tmp_path, capsys):
    places = ["--output_dir", str(tmp_path), "--results", str(RESULTS)]
    cases = {"": 30, "--seeds 12 --condition sparse": 3, "--missing": 0, "--missing --seeds 12 30": 6}
    for words, count in cases.items():
        reproduce.main(reproduce.get_args(["--claim", "1", "--dry_run", *places, *words.split()]))
        assert capsys.readouterr().out.count("python ") == count and not list(tmp_path.iterdir())
    for wrong in ("--claim 12", "--seeds -1", "--budget photographs", "--data_path x"):
        with pytest.raises(SystemExit, match="2"):
            reproduce.get_args(wrong.split())
        assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.slow
def test_the_night_and_a_number_of_claim_6_at_a_toy_scale(tmp_path, monkeypatch, drawn):
    monkeypatch.setattr(reproduce, "BUDGETS", {name: budget | TOY for name, budget in BUDGETS.items()})
    places, results = ["--output_dir", str(tmp_path / "my runs"), "--results", str(tmp_path)], tmp_path / "night"
    for words in (["--claim", "6", "--condition", "added at fine-tuning"], ["--budget", "night"]):
        reproduce.main(reproduce.get_args([*words, *places]))
    page, rows = (results / "README.md").read_text(), reproduce.recorded_rows(results)
    assert "not run" not in page and "so far" not in page and len([*results.glob("claim_night_course_*.png")]) == 3
    for network, condition in CLAIMS["night course"].conditions.items():
        for metric in condition.metrics.keys() - {"maps", "loss"}:
            parts = [(row["epoch"], row["block"]) for row in rows["night course", network, metric, 0]]
            assert parts == [(n, str(k)) for n in "12" for k in range(7)]
    for name, network in (("V1", "V1"), ("V2 after GRN", "V2")):
        (row,) = rows["night 3", name, "collapse, last block", 0]
        assert row["value"] == rows["night course", network, "collapse", 0][-1]["value"] and "my runs" in row["command"]
        assert float(row["minutes"]) > 0 and f"torch: {torch.__version__}" in row["versions"]
    assert ("6", "added at fine-tuning", "fine-tuning", 1) in reproduce.recorded_rows(tmp_path)
