"""The processes of a run: one with plain `python`, several under `torchrun`."""

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

from plumbing.devices import choose_device
from plumbing.script import UserError


@dataclass(frozen=True)
class Processes:
    """This process among those of the run: one with plain `python`, several under `torchrun`."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def local_world_size(self) -> int:
        """Processes of this run on this machine."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", 1))

    def sum(self, values: Sequence[torch.Tensor]) -> list[float]:
        """The sum over processes of a few scalars, with one reduction and one device synchronisation."""
        stacked = torch.stack([value.detach().to(self.device) for value in values])
        if self.world_size > 1:
            distributed.all_reduce(stacked)
        return stacked.tolist()

    def max(self, *values: int) -> list[int]:
        """The largest over processes of each value, through the CPUs: it does not wait for a device."""
        largest = torch.tensor(values)
        if self.world_size > 1:
            distributed.all_reduce(largest, distributed.ReduceOp.MAX)
        return largest.tolist()

    def gather(self, value: Any) -> list:
        """Every process's value, in the order of ranks."""
        gathered = [value] * self.world_size
        if self.world_size > 1:
            distributed.all_gather_object(gathered, value)
        return gathered

    def union(self, members: set) -> set:
        """The union of every process's set."""
        return set().union(*self.gather(members))

    def from_main(self, decide: Callable[[], Any]) -> Any:
        """What `decide()` returns in the main process, for all of them; a UserError that it raises there is raised in all."""
        outcome = [None]
        if self.is_main:
            try:
                outcome = [decide()]
            except UserError as error:
                outcome = [error]
        if self.world_size > 1:
            distributed.broadcast_object_list(outcome)
        if isinstance(outcome[0], UserError):
            raise outcome[0]
        return outcome[0]


def setup_processes(device: str | None, timeout_minutes: float = 10.0) -> Processes:
    """Choose the device (CUDA when there is one, or as asked) and join the process group that torchrun describes.

    A process that waits longer than `timeout_minutes` for another one ends; for one that has died on a CPU run it ends at once.
    """
    chosen = choose_device(device)
    described = torchrun_variables()
    if described is None:
        return Processes(0, 1, chosen)
    rank, world_size, local_rank = described
    if chosen.type == "mps" and world_size > 1:
        raise UserError(f"--device mps is for one process, not {world_size}; start it without torchrun, or take --device cpu")
    if chosen.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise UserError(f"process {local_rank} has no GPU: {torch.cuda.device_count()} here; lower torchrun's --nproc_per_node")
        chosen = torch.device("cuda", local_rank)
        torch.cuda.set_device(chosen)
    backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"  # on GPU runs decisions travel through the CPUs
    timeout = timedelta(minutes=timeout_minutes)
    try:
        store, _, _ = next(distributed.rendezvous("env://", rank, world_size, timeout=timeout))
        # torchrun keeps its store over restarts: without a prefix, a process may wait for one of the earlier attempt.
        store = distributed.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        distributed.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(f"process {rank} cannot meet the others at {where} ({str(error).splitlines()[0]}); see torchrun") from None
    return Processes(rank, world_size, chosen)


TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "MASTER_ADDR")


def torchrun_variables() -> tuple[int, int, int] | None:
    """RANK, WORLD_SIZE and LOCAL_RANK as torchrun sets them, None for a single process; UserError when they are wrong."""
    found = [key for key in TORCHRUN_VARIABLES[:3] if key in os.environ]
    if not found:
        return None
    if missing := [key for key in TORCHRUN_VARIABLES if key not in os.environ]:
        raise UserError(f"{', '.join(missing)} not set though {found[0]} is; unset it, or start several processes with torchrun")
    numbers = {key: os.environ[key] for key in (*TORCHRUN_VARIABLES[:4], "LOCAL_WORLD_SIZE") if key in os.environ}
    for key, text in numbers.items():
        if not text.isdecimal():
            raise UserError(f"{key}={text} is not a whole number; start several processes with torchrun, which sets it")
    rank, world_size, local_rank, port = (int(numbers[key]) for key in TORCHRUN_VARIABLES[:4])
    if rank >= world_size or int(numbers.get("LOCAL_WORLD_SIZE", 1)) < 1:
        raise UserError(f"RANK={rank} is not below WORLD_SIZE={world_size}; start several processes with torchrun, which sets both")
    if rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":  # else torchrun listens already
        try:
            socket.create_server(("", port)).close()
        except (OSError, OverflowError) as error:
            raise UserError(f"MASTER_PORT={port} cannot be used ({error}); choose another, as by torchrun --master_port") from None
    return rank, world_size, local_rank


@contextmanager
def main_process_first() -> Iterator[None]:
    """Let the main process do something once, such as a download, before the others do it too."""
    waiting = distributed.is_initialized() and distributed.get_rank() > 0
    if waiting:
        distributed.barrier()
    yield
    if distributed.is_initialized() and not waiting:
        distributed.barrier()
