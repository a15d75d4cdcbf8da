"""What this machine can do: devices, the dtype to compute in, memory, and torchrun's processes."""

import ctypes
import os
import pathlib

import torch

from cli.errors import UserError

RANK = int(os.environ.get("RANK", 0))  # set by torchrun, as is WORLD_SIZE
WORLD = int(os.environ.get("WORLD_SIZE", 1))


def default_device() -> str:
    """The device of a command without --device."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_device(device: str) -> None:
    """Raises UserError when PyTorch cannot compute on `device` here."""
    try:
        torch.zeros(1, device=device).item()  # .item(), as "meta" allocates but holds no numbers
    except (RuntimeError, AssertionError) as e:
        reason = str(e).splitlines()[0]
        raise UserError(
            f"--device {device} cannot be used here: {reason}; try --device cpu"
        ) from None


def compute_dtype(stored: torch.dtype, device: str) -> torch.dtype:
    """The dtype to compute in for weights `stored` in some dtype.

    bfloat16 for 16-bit weights where `device` multiplies it natively, else float32: a CPU without
    bfloat16 instructions takes five times as long in bfloat16, and training in float16 would need
    loss scaling.
    """
    if torch.device(device).type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.cpu._is_avx512_bf16_supported()
    if native and stored.itemsize == 2:
        return torch.bfloat16
    return torch.promote_types(stored, torch.float32)


def trim_heap() -> None:
    """Returns freed memory to the system, where the C library can (glibc keeps it otherwise)."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def memory_in_use(device: str) -> float:
    """GB in use: a GPU's peak; on a CPU what is resident now; 0 where the system does not say."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    statm = pathlib.Path("/proc/self/statm")  # Linux only
    if not statm.exists():
        return 0.0
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e9
