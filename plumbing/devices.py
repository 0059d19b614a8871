"""CPUs and GPUs: which one, how memory is laid out there, and in which precision it computes."""

import ctypes
import os
import sys

import torch
from torch import nn

from plumbing.script import UserError, remark


def choose_device(name: str | None) -> torch.device:
    """The device of --device, CUDA by default where there is one; UserError if it cannot be used."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if name == "gpu":
            raise UserError("--device gpu is no device of torch's; did you mean cuda?")
        device = torch.device(name)
        if device.type not in ("cuda", "cpu", "mps"):
            raise RuntimeError("neither cuda, cpu nor mps")
        if device.type == "mps" and not torch.backends.mps.is_available():
            raise RuntimeError("this machine or this torch has no MPS")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} cannot be used here ({str(error).splitlines()[0]}); try --device cpu") from None
    if device.type == "mps":
        remark("--device mps: never run by us; compare the first losses with those of --device cpu")
    if device.type == "cpu":
        keep_heap_mapped()
    return device


def keep_heap_mapped() -> None:
    """Keep freed memory instead of returning it to the system after every operation.

    With glibc's defaults each large temporary is mapped, zeroed page by page and unmapped again; `python bench.py heap` measures
    what that costs a training step. Elsewhere than on glibc, or with HEAP=default in the environment, this does nothing.
    """
    if os.environ.get("HEAP") == "default":
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    m_trim_threshold, m_mmap_threshold = -1, -3
    mallopt(m_mmap_threshold, 1 << 30)
    mallopt(m_trim_threshold, (1 << 31) - 1)


def to_device(model: nn.Module, device: torch.device) -> None:
    """Move a model to its device, in channels_last.

    Where a dimension of size 1 leaves two ways to number the strides, as in a depthwise kernel, parameters keep the plain one, which
    their gradients have too: DDP warns of any difference.
    """
    model.to(device, memory_format=torch.channels_last)
    for parameter in model.parameters():
        if parameter.is_contiguous():
            parameter.data = parameter.data.flatten().view(parameter.shape)


def set_determinism(on: bool) -> None:
    """Have torch choose operations that give the same bits every time, or raise where it has none."""
    if on:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(on)
    torch.backends.cudnn.benchmark = False


def emulates_half(device: torch.device) -> bool:
    """Whether the device is an x86 CPU without AVX-512, on which half precision saves memory but costs over ten times the time."""
    return device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2"


def autocast_dtype(amp: str | None, device: torch.device) -> torch.dtype | None:
    """The autocast type of `--amp`; by default bfloat16 on GPUs that have it, float16 on older ones, none on CPUs."""
    if amp is None:
        amp = "none" if device.type != "cuda" else "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if amp != "none" and emulates_half(device) and os.environ.get("RANK", "0") == "0":
        print(
            f"warning: --amp {amp} takes far longer than float32 on this CPU, which has no AVX-512; leave it out", file=sys.stderr
        )
    return {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]
