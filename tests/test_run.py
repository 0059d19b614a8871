"""Claims about plumbing/run.py that hold for any stage: it equals a plain loop, from wherever it was stopped."""

import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import CPU, Killed, assert_equal, call_at, read_log, words

from plumbing import cli, dist, run, tasks
from plumbing.files import UserError, find_checkpoints, load_file
from plumbing.loading import Samples, mix_seed
from plumbing.run import Run


class Points(Samples):
    """Eleven points of three numbers; each target is a dictionary."""

    def __init__(self):
        super().__init__(torch.randn(11, 3, generator=torch.Generator().manual_seed(0)))
        self.targets = self.items @ torch.tensor([1.0, -2.0, 3.0])

    def read(self, index: int) -> torch.Tensor:
        return self.items[index]

    def augment(self, point: torch.Tensor, index: int) -> tuple[torch.Tensor, dict]:
        return point, {"value": self.targets[index], "index": index}

    def collate(self, samples: list) -> list:
        return [list(column) for column in zip(*samples)]

    def on_device(self, points: list, targets: list, device: torch.device) -> tuple[list, list]:
        return [point.to(device) for point in points], targets


def new_run(directory, rates=None, ema=None, device=CPU, **more) -> Run:
    """Of as many updates as `rates` has learning rates; else of three epochs, or as many as `more` says."""
    parser = cli.Parser()
    cli.add_data_flags(parser, ["points"], "none", (1, 1))
    tasks.add_transfer_flags(cli.add_optimisation_flags(parser, epochs=3, blr=1.0, min_lr=0.0, warmup=0))
    cli.add_run_flags(parser, str(directory))
    values = dict(lr=0.1, warmup_epochs=0, batch_size=2, log_every=1, num_workers=0, data_set="points") | more
    args, net = parser.parse_args(words(**values)), torch.nn.Linear(3, 1, bias=False)
    torch.nn.init.zeros_(net.weight)
    optimizer, ema = torch.optim.SGD(net.parameters()), ema and tasks.averaged(net, ema)
    schedule = rates and (lambda _: rates.__getitem__)
    return Run(args, Points(), device, net, optimizer, "points.py", ema, schedule, iterations=rates and len(rates))


def train(directory, evaluate=None, **more) -> torch.Tensor:
    """The weights (3,) that a run ends with."""
    with new_run(directory, **more) as this:
        for epoch in this.epochs():
            for batch in this.batches(epoch):
                errors = [this.network(x)[0] - y["value"] for x, y in zip(batch.images, batch.targets)]
                if this.backward(sum(error**2 for error in errors) / len(errors)):
                    this.update()
            if evaluate and this.evaluation_due(epoch):
                evaluate(this, epoch)
            if this.save_due(epoch):
                this.save(epoch + 1)
    this.finish("nothing")
    return this.net.weight.detach()[0]


def train_plainly(rates: list[float], per_update: int = 2) -> torch.Tensor:
    """One update of `per_update` points for each learning rate; ten of the eleven points are an epoch."""
    points, weight, starts = Points(), torch.zeros(3), range(0, 10, per_update)
    for update, rate in enumerate(rates):
        epoch, k = divmod(update, len(starts))
        order = torch.randperm(11, generator=torch.Generator().manual_seed(mix_seed("order", 0, epoch)))[:10]
        chosen = order[starts[k] : starts[k] + per_update]
        x, y = points.items[chosen], points.targets[chosen]
        weight = weight - rate * 2 * (x @ weight - y) @ x / len(chosen)
    return weight


STEPPED = [0.025, 0.05, 0.075, 0.1, 0.1, 0.1, 0.01, 0.01]


def test_a_run_of_iterations_follows_its_own_schedule_and_ends_inside_an_epoch(tmp_path, capsys):
    weight = train(tmp_path, rates=STEPPED)
    torch.testing.assert_close(weight, train_plainly(STEPPED))
    assert read_log(tmp_path, "update", "lr", "epoch") == [[k, rate, k / 5] for k, rate in enumerate(STEPPED, start=1)]
    assert [path.name for path in find_checkpoints(tmp_path)] == ["checkpoint-1.pth", "checkpoint-2.pth"]
    with ThreadPoolExecutor() as pool:  # where no signal can be handled
        assert torch.equal(pool.submit(train, tmp_path, rates=STEPPED).result(), weight)
    assert "had finished before" in capsys.readouterr().out


@pytest.mark.parametrize(("freq", "per_update"), [(2, 4), (7, 10)])
def test_accumulated_passes_make_the_update_of_one_large_batch(tmp_path, freq, per_update):
    """An epoch is 4, 4 and 2 points; or, of fewer passes than an update may have, 10."""
    weight = train(tmp_path, rates=[0.1] * 5, update_freq=freq)
    torch.testing.assert_close(weight, train_plainly([0.1] * 5, per_update))


KILLS = [(1, 2, Points, "on_device", 4), (1, 2, Points, "on_device", 7), (2, 1, Points, "on_device", 4)]
KILLS += [(2, 1, Points, "on_device", 7), (1, 4, Run, "save_due", 2)]  # the last one after all updates


@pytest.mark.parametrize(("freq", "every", "kind", "name", "turn"), KILLS)
def test_an_interrupted_run_continues_exactly(tmp_path, monkeypatch, freq, every, kind, name, turn):
    more = dict(rates=STEPPED[: 8 // freq], save_every_steps=every, update_freq=freq, ema=0.5)
    whole = train(tmp_path / "whole", **more)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        call_at(patch, kind, name, turn)
        train(tmp_path / "parts", **more)
    assert find_checkpoints(tmp_path / "parts") and not (tmp_path / "parts/checkpoint-2.pth").exists()
    with open(tmp_path / "parts/log.jsonl", "a") as file:
        file.write('{"update": 9, "lo')  # cut short by the kill
    assert torch.equal(train(tmp_path / "parts", **more), whole)
    states = [load_file(find_checkpoints(tmp_path / name)[-1]) for name in ("whole", "parts")]
    assert_equal(*(state["model_ema"] for state in states))
    keys = "update", "lr", "loss", "grad_norm"
    assert read_log(tmp_path / "parts", *keys) == read_log(tmp_path / "whole", *keys)


def test_two_processes_share_an_update_and_draw_differently(tmp_path, monkeypatch):
    """Every pass's `part` is the position of its points in the epoch's order, and no two passes are seeded alike."""
    seeds, positions = set(), {}
    monkeypatch.setattr(dist, "world_size", lambda: 2)
    monkeypatch.setattr(run, "DistributedDataParallel", lambda net, **_: net)
    monkeypatch.setattr(dist, "gather", lambda value: [value])
    for rank in range(2):
        monkeypatch.setattr(dist, "rank", lambda rank=rank: rank)
        with new_run(tmp_path / str(rank), update_freq=2, batch_size=1) as this:
            for batch in this.batches(0):
                seeds.add(torch.initial_seed())
                positions[batch.update, batch.part.start] = batch.targets[0]["index"]
                this.done += this.completes_update
    order = torch.randperm(11, generator=torch.Generator().manual_seed(mix_seed("order", 0, 0)))[:10].tolist()
    assert len(seeds) == 10
    assert positions == {(k // 4, k % 4): index for k, index in enumerate(order)}


def test_another_run_is_refused_with_its_differences_and_more_epochs_continue(tmp_path, capsys):
    train(tmp_path / "a", epochs=2)
    with pytest.raises(UserError, match=r"--weight_decay 0.05 \(now 0.1\), --seed 0 \(now 1\); repeat these"):
        new_run(tmp_path / "a", epochs=2, weight_decay=0.1, seed=1)
    with pytest.raises(UserError, match=r"--batch_size x --update_freq x processes 2 \(now 4\)"):
        new_run(tmp_path / "a", epochs=2, update_freq=2)
    with pytest.raises(UserError, match=r"--epochs 2 \(now 1\)"):
        new_run(tmp_path / "a", epochs=1)
    assert new_run(tmp_path / "a", epochs=3, warmup_epochs=0.5).epochs() == range(2, 3)
    assert "--epochs 2 before, now 3" in capsys.readouterr().out
    resumed = new_run(tmp_path / "b", epochs=2, weight_decay=0.1, resume=tmp_path / "a/checkpoint-1.pth")
    assert resumed.epochs() == range(1, 2) and len(resumed.records) == 5
    assert resumed.optimizer.param_groups[0]["weight_decay"] == 0  # the new run's own


@pytest.mark.parametrize("winner", ["model", "model_ema"])
def test_the_better_of_weights_and_average_is_kept_while_it_is_the_best(tmp_path, winner):
    written, weights = [], []

    def evaluate(this, epoch):
        def score(net):
            name = "model" if net is this.net else "model_ema"
            return {"score": [1.0, 3.0, 2.0][epoch] - 0.5 * (name != winner)}, f"{name} {epoch}"

        weights.append({"model": this.net.weight.clone(), "model_ema": this.ema.module.weight.clone()})
        tasks.evaluate(this, epoch, score, "score", str, lambda _, details: written.append((this.best, details)))

    train(tmp_path, evaluate, ema=0.9)
    assert written == [(1.0, f"{winner} 0"), (3.0, f"{winner} 1")]
    best = load_file(tmp_path / "checkpoint-best.pth")
    assert torch.equal(best["model"]["weight"], weights[1][winner]) and not torch.equal(*weights[1].values())
    assert best["epoch"] == 2 and best["score"] == 3
    keys = ["val_score", "val_ema_score"] if winner == "model" else ["val_ema_score", "val_score"]
    rows = [row for row in read_log(tmp_path, *keys, "best_score") if row[2] is not None]
    assert rows == [[1, 0.5, 1], [3, 2.5, 3], [2, 1.5, 3]]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_after_its_update_and_handlers_are_restored(tmp_path, monkeypatch, number):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as at a terminal; a script in the background ignores it
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match=str(128 + number)):
        call_at(patch, Points, "on_device", 3, lambda: signal.raise_signal(number))
        train(tmp_path, rates=STEPPED)
    assert [path.name for path in find_checkpoints(tmp_path)] == ["checkpoint-0-3.pth"]
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before
    torch.testing.assert_close(train(tmp_path, rates=STEPPED), train_plainly(STEPPED))


def test_a_second_signal_ends_at_once_and_an_ignored_one_stays_ignored(tmp_path):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with new_run(tmp_path) as this:
        signal.raise_signal(signal.SIGINT)
        assert not this.signal and signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # within a second: the same one, by way of torchrun
        this.received -= 2
        with pytest.raises(SystemExit):
            signal.raise_signal(signal.SIGTERM)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_too_many_unreadable_samples_end_the_run(tmp_path, monkeypatch):
    reads, bad = Points.read, {0, 1}
    monkeypatch.setattr(Points, "read", lambda self, index: reads(self, index) if index not in bad else 1 / 0)
    train(tmp_path / "few", epochs=3)
    assert read_log(tmp_path / "few", "unreadable_images")[-1] == [2]
    bad |= set(range(11))
    for workers in (0, 1):
        with pytest.raises(UserError, match="^none of the 11 images can be read; check the files"):
            train(tmp_path / "all", epochs=1, num_workers=workers)
    bad -= {5, 6, 7}
    monkeypatch.setattr(run, "max", lambda *_: 1, raising=False)  # so few may be, as if there were a hundred images
    with pytest.raises(UserError, match=r"\d of 11 images cannot be read"):
        train(tmp_path / "many", epochs=1)


def test_the_loader_has_the_workers_of_the_flag_and_pins_memory_for_a_gpu(tmp_path):
    for device in ("cuda", "cpu"):
        loader = new_run(tmp_path, device=torch.device(device), amp="none", num_workers=2).loader
        assert (loader.num_workers, loader.pin_memory) == (2, device == "cuda")


def test_compile_compiles_the_network_that_is_trained(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(torch, "compile", lambda net: lambda x: calls.append(0) or net(x))
    torch.testing.assert_close(train(tmp_path, compile=True, rates=STEPPED), train_plainly(STEPPED))
    assert len(calls) == 16  # one for each point


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_a_bar_at_a_terminal_and_plain_lines_in_a_file(tmp_path, monkeypatch, capsys, terminal):
    monkeypatch.setattr(run.sys.stderr, "isatty", lambda: terminal, raising=False)
    train(tmp_path, epochs=1)
    printed = capsys.readouterr()
    assert ("loss" in printed.err) == terminal and ("epoch 1.00/1  loss" in printed.out) != terminal
