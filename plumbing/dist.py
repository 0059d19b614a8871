"""The device, the precision, and the processes of a run: one with plain `python`, several under `torchrun`."""

import ctypes
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import distributed, nn

from plumbing.files import UserError


def setup(name: str | None, deterministic: bool = False) -> torch.device:
    """Join the processes that torchrun started, if any; return this one's device: `name`, else CUDA if there is one.

    deterministic: choose operations that give the same bits every time. On a CPU all do.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name} cannot be used here ({reason}); try --device cpu") from None
    if "RANK" in os.environ and not distributed.is_initialized():
        if device.type == "cuda":
            device = torch.device("cuda", local_rank())
            torch.cuda.set_device(device)
        store, number, count = next(distributed.rendezvous("env://"))
        # torchrun keeps its store over restarts: without a prefix, processes would wait for those of the last attempt.
        store = distributed.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        distributed.init_process_group(backend, store=store, rank=number, world_size=count)
    if device.type == "cpu":
        _keep_heap_mapped()
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    return device


def _keep_heap_mapped() -> None:
    """Have glibc keep freed memory: by default it maps, zeroes and unmaps all large blocks (4 to 19% of the time)."""
    with suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


def rank() -> int:
    """Return this process's number, also known before `setup`."""
    return int(os.environ.get("RANK", 0))


def local_rank() -> int:
    """Return this process's number on its machine, which is also its GPU's."""
    return int(os.environ.get("LOCAL_RANK", 0))


def world_size() -> int:
    """Count the processes."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def say(line: str) -> None:
    """Print in the main process, escaping characters that the output cannot encode."""
    if rank() == 0:
        encoding = sys.stdout.encoding or "utf-8"
        print(line.encode(encoding, "backslashreplace").decode(encoding), flush=True)


def total(values: Sequence[torch.Tensor]) -> list[float]:
    """Sum a few scalars over processes, with one reduction and one wait for the device."""
    stacked = torch.stack(list(values))
    if world_size() > 1:
        distributed.all_reduce(stacked)
    return stacked.tolist()


def maximum(number: int) -> int:
    """Return the largest of the processes' numbers; on the CPU, so as not to wait for a GPU."""
    largest = torch.tensor(number)
    if world_size() > 1:
        distributed.all_reduce(largest, distributed.ReduceOp.MAX)
    return int(largest)


def gather(value: Any) -> list:
    """Collect every process's value, in the order of ranks; no process goes on before all have arrived."""
    gathered = [value] * world_size()
    if world_size() > 1:
        distributed.all_gather_object(gathered, value)
    return gathered


@contextmanager
def main_process_first() -> Iterator[None]:
    """Let the main process do something once, such as a download, before the others do it too."""
    if rank() > 0 and world_size() > 1:
        distributed.barrier()
    yield
    if rank() == 0 and world_size() > 1:
        distributed.barrier()


def to_device(model: nn.Module, device: torch.device) -> nn.Module:
    """Move a model to its device, in channels_last, and return it.

    Where a dimension of size 1 allows two sets of strides, as in a depthwise kernel, parameters keep the contiguous
    one, as their gradients do: DDP warns of any difference.
    """
    model.to(device, memory_format=torch.channels_last)
    for parameter in model.parameters():
        if parameter.is_contiguous():
            parameter.data = parameter.data.flatten().view(parameter.shape)
    return model


def autocast(amp: str | None, device: torch.device) -> torch.autocast:
    """Return the precision of `--amp`: by default bfloat16 on GPUs that have it, float16 on others, float32 on CPUs."""
    if amp is None and device.type == "cuda":
        amp = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(amp, torch.float32)
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
