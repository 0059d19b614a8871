"""Claims about plumbing/run.py that hold for any stage: runs counted in iterations, schedules of their own, targets of any kind."""

import pytest
import torch
from helpers import ALONE, assert_equal, call_at, words
from torch.utils.data import Dataset

from plumbing import flags, run
from plumbing.files import find_checkpoints, load_file
from plumbing.log import read_log
from plumbing.processes import Processes
from plumbing.run import Run
from plumbing.seeds import mix_seed


class Points(Dataset):
    """Eleven points of three numbers, and for targets a dictionary each: what a network shall make of them."""

    def __init__(self):
        self.items = torch.randn(11, 3, generator=torch.Generator().manual_seed(0))
        self.targets = self.items @ torch.tensor([1.0, -2.0, 3.0])

    def __len__(self) -> int:
        return 11

    def __getitem__(self, place: tuple[int, int]):
        _, index = place
        return self.items[index], {"value": self.targets[index], "index": index}, -1

    def collate(self, items: list) -> tuple[list, list, torch.Tensor]:
        points, targets, failed = zip(*items)
        return list(points), list(targets), torch.tensor(failed)

    def on_device(self, points: list, targets: list, device: torch.device) -> tuple[list, list]:
        return [point.to(device) for point in points], targets


def settings(directory, **more):
    parser = flags.Parser()
    flags.add_data_flags(parser, ["points"], "none")
    flags.add_optimisation_flags(parser, epochs=3, blr=1.0, min_lr=0.0, warmup="0")
    flags.add_run_flags(parser, str(directory))
    chosen = dict(lr=0.1, warmup_epochs=0, batch_size=2, log_every=1, num_workers=0, output_dir=directory, data_set="points") | more
    return flags.merge(parser.parse_args(words(**chosen)), parser.general)


def train(directory, iterations=None, schedule=None, **more) -> torch.Tensor | None:
    """The weights (3,) that a run ends with, None if it had ended before."""
    directory.mkdir(exist_ok=True)
    this = Run(settings(directory, **more), Points(), ALONE, directory, iterations)
    net = torch.nn.Linear(3, 1, bias=False)
    torch.nn.init.zeros_(net.weight)
    network = this.start(net, torch.optim.SGD(net.parameters(), lr=this.peak_lr), "points.py", schedule=schedule)
    if network is None:
        return None
    for epoch in this.epochs():
        for batch in this.batches(epoch):
            assert isinstance(batch.images, list) and set(batch.targets[0]) == {"value", "index"}
            loss = sum((network(x)[0] - y["value"]) ** 2 for x, y in zip(batch.images, batch.targets)) / len(batch.images)
            if this.backward(loss):
                this.update()
        if this.save_due(epoch):
            this.save(epoch + 1)
    this.close("nothing")
    return net.weight.detach()[0]


def train_plainly(rates: list[float], per_update: int = 2) -> torch.Tensor:
    """As many updates as there are rates, each of so many points; ten of the eleven points are an epoch."""
    points, weight, places = Points(), torch.zeros(3), range(0, 10, per_update)
    for update, rate in enumerate(rates):
        epoch, place = divmod(update, len(places))
        order = torch.randperm(11, generator=torch.Generator().manual_seed(mix_seed("order", 0, epoch)))[:10]
        chosen = order[places[place] : places[place] + per_update]
        x, y = points.items[chosen], points.targets[chosen]
        weight = weight - rate * 2 * (x @ weight - y) @ x / len(chosen)
    return weight


def stepped(update: int) -> float:
    """Warm-up over four iterations, then a tenth from iteration 6 on."""
    return 0.1 * min(1, (update + 1) / 4) * (0.1 if update >= 6 else 1)


STEPPED = [0.025, 0.05, 0.075, 0.1, 0.1, 0.1, 0.01, 0.01]


def test_a_run_of_iterations_ends_after_them_in_the_middle_of_an_epoch(tmp_path):
    weight = train(tmp_path, iterations=8, schedule=stepped)
    torch.testing.assert_close(weight, train_plainly(STEPPED))
    records = read_log(tmp_path)
    assert [record["update"] for record in records] == [1, 2, 3, 4, 5, 6, 7, 8] and records[-1]["epoch"] == 1.6
    assert [path.name for path in find_checkpoints(tmp_path)] == ["checkpoint-1.pth", "checkpoint-2.pth"]
    assert train(tmp_path, iterations=8, schedule=stepped) is None


def test_a_schedule_of_ones_own_is_followed_update_by_update(tmp_path):
    train(tmp_path, iterations=8, schedule=stepped)
    assert [record["lr"] for record in read_log(tmp_path)] == pytest.approx(STEPPED)


def test_the_usual_schedule_of_a_run_of_iterations_falls_to_its_end(tmp_path):
    train(tmp_path, iterations=8)  # half a cosine from 0.1 to 0
    assert [record["lr"] for record in read_log(tmp_path)][::2] == pytest.approx([0.1, 0.08535534, 0.05, 0.01464466])


@pytest.mark.parametrize("turn", [4, 7])
def test_a_run_of_iterations_that_was_interrupted_continues_exactly(tmp_path, monkeypatch, turn):
    more = dict(iterations=8, schedule=stepped, save_every_steps=2)
    whole = train(tmp_path / "whole", **more)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        call_at(patch, Points, "on_device", turn)
        train(tmp_path / "parts", **more)
    assert not (tmp_path / "parts/checkpoint-2.pth").exists()
    assert torch.equal(train(tmp_path / "parts", **more), whole)
    states = [load_file(tmp_path / name / "checkpoint-2.pth")["model"] for name in ("whole", "parts")]
    assert_equal(*states)
    assert [record["update"] for record in read_log(tmp_path / "parts")] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_run_of_iterations_killed_between_its_last_update_and_its_end_has_nothing_left_to_train(tmp_path, monkeypatch):
    more = dict(iterations=8, schedule=stepped, save_every_steps=4)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        call_at(patch, Run, "save_due", 2)
        train(tmp_path, **more)
    assert find_checkpoints(tmp_path)[-1].name == "checkpoint-1-3.pth"
    torch.testing.assert_close(train(tmp_path, **more), train_plainly(STEPPED))
    assert len(read_log(tmp_path)) == 8


def test_accumulated_passes_make_the_update_of_one_large_batch(tmp_path):
    weight = train(tmp_path, iterations=5, schedule=lambda _: 0.1, update_freq=2)  # an epoch is 4, 4 and 2 points
    torch.testing.assert_close(weight, train_plainly([0.1] * 5, per_update=4))


# --- flags that a short run cannot show -------------------------------------------------------------------------------


def test_the_loader_is_built_as_the_flags_say(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(run, "make_loader", lambda images, sampler, workers, pin_memory: asked.append((workers, pin_memory)))
    for device in ("cuda", "cpu"):
        for more in (dict(), dict(num_workers=3), dict(pin_mem=False)):
            Run(settings(tmp_path, amp="none", **more), Points(), Processes(0, 1, torch.device(device)), tmp_path)
    assert asked == [(0, True), (3, True), (0, False), (0, False), (3, False), (0, False)]


def test_compile_compiles_the_network_that_is_trained(tmp_path, monkeypatch):
    class Compiled(torch.nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net, self.calls = net, 0
            compiled.append(self)

        def forward(self, x):
            self.calls += 1
            return self.net(x)

    compiled = []
    monkeypatch.setattr(torch, "compile", Compiled)
    weights = [train(tmp_path / str(on), iterations=3, compile=on) for on in (False, True)]
    assert torch.equal(*weights) and [network.calls for network in compiled] == [6]
    assert load_file(tmp_path / "True/checkpoint-1.pth")["model"].keys() == {"weight"}  # of the network, not of what compiles it
