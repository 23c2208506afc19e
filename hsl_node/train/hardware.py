"""What this machine trains with: device, threads, precision, determinism. Only here is torch's global state set."""

from __future__ import annotations

import gc
import hashlib
import logging
import os
import platform
import re
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hsl_node.errors import ConfigError
from hsl_node.host.cores import available_cores
from hsl_node.host.malloc import give_freed_memory_back

log = logging.getLogger(__name__)

# Where each starts to pay, measured on 2 cores with AMX, ResNet18 pairs/s: at 32 px float32 164, bfloat16 134; at 64 px
# float32 66, bfloat16 with channels-last 80; at 224 px 5 and 19. Channels-last without bfloat16 loses below 128 px.
BFLOAT16_FROM_PX = 64
CHANNELS_LAST_FLOAT32_FROM_PX = 128
# Depthwise convolutions are slow in bfloat16 on a CPU: efficientnet_lite0, 32 images of 96 px, one core with AVX-512
# bfloat16: float32 0.46 s a step, float32 with channels-last 0.32, bfloat16 0.59 and 0.55.
DEPTHWISE = ("efficientnet", "mobilenet", "mnasnet")


@dataclass(frozen=True)
class Hardware:
    device: torch.device
    threads: int  # results depend on it, so it stays the same for a whole run
    precision: str  # of the trunks: float32 | bfloat16
    memory_format: torch.memory_format
    devices: int = 1  # of this site, this one included, that compute a batch together

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == "bfloat16" else torch.float32

    @property
    def processor(self) -> str:
        """Its maker's name for it, where the system tells; else its kind."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
        return platform.machine()

    @property
    def facts(self) -> dict[str, Any]:
        """What of it decides the bytes of a result."""
        device = f"{self.device} x {self.devices}" if self.devices > 1 else str(self.device)
        return {"threads": self.threads, "device": device, "precision": self.precision}


def prepare(
    *,
    device: str = "auto",
    threads: int = 0,
    precision: str = "auto",
    image_size: int = 224,
    backbone: str = "resnet18",
    devices: int = 1,
    rank: int = 0,
) -> Hardware:
    """Choose and set up device, threads, precision and deterministic algorithms, for the whole process.

    devices: so many from that one on, of which this process has number `rank`; several of the CPU share its cores.

    Raises:
        ConfigError: a device is asked for that is not there, or that the installed torch has no code for.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with a fixed workspace
    chosen = _device(device)
    first, count = chosen.index or 0, torch.cuda.device_count()
    if devices > 1 and device != "cpu" and (chosen.type == "cpu" or first + devices > count):
        raise ConfigError(
            f'train.gpus = {devices} from "{chosen}" on: torch sees {count} CUDA device(s)',
            remedy="check nvidia-smi and the driver, or set train.gpus = 1",
        )
    if devices > 1 and chosen.type == "cuda":  # all are looked at by each process: the first says what is wrong
        chosen = [_device(f"cuda:{first + number}") for number in range(devices)][rank]
    cuda = chosen.type == "cuda"
    # On CUDA an operation without a deterministic form warns and runs: a hospital's run must not end over it.
    torch.use_deterministic_algorithms(True, warn_only=cuda)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a costly debugging aid
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    depthwise = any(name in backbone for name in DEPTHWISE)
    torch.set_num_threads(threads or max(1, available_cores() // (1 if cuda else devices)))
    if precision == "auto":
        pays = cuda or (image_size >= BFLOAT16_FROM_PX and not depthwise)
        precision = "bfloat16" if pays and has_bfloat16(chosen) else "float32"
    last = cuda or depthwise or precision == "bfloat16" or image_size >= CHANNELS_LAST_FLOAT32_FROM_PX
    return Hardware(
        device=chosen,
        threads=torch.get_num_threads(),
        precision=precision,
        memory_format=torch.channels_last if last else torch.contiguous_format,
        devices=devices,
    )


def has_bfloat16(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16 itself. Emulated, autocast is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def moved(array: NDArray[Any], device: torch.device) -> torch.Tensor:
    """To the device; without waiting for it, which a copy from ordinary memory would."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def give_memory_back(device: torch.device) -> None:
    """Between rounds, which may lie hours apart, a GPU is for others too, and so is the machine's memory."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    give_freed_memory_back()


def derived_seed(*parts: object) -> int:
    """A 64-bit seed from what it is for, e.g. (plan seed, peer, round, epoch): randomness is derived, never carried."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:8], "little")


def _device(name: str) -> torch.device:
    """auto: the first GPU that the installed torch can use, else the CPU."""
    if name == "auto":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        usable = [number for number in range(count) if _has_code_for(number)]
        if count and not usable:
            log.warning("training on the CPU: %s", _no_code_for(0))
        return torch.device(f"cuda:{usable[0]}" if usable and usable[0] else "cuda" if usable else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f'train.device = "{name}": torch sees {torch.cuda.device_count()} CUDA device(s)',
            remedy='check nvidia-smi and the driver, or set train.device = "cpu"',
        )
    if device.type == "cuda" and not _has_code_for(device.index or 0):
        raise ConfigError(
            f'train.device = "{name}": {_no_code_for(device.index or 0)}',
            remedy='install a build of torch for this GPU, or set train.device = "cpu" or another GPU',
        )
    return device


def _has_code_for(number: int) -> bool:
    """Machine code runs on its own generation, from its own step on; code for later ones ("compute", PTX) is translated
    by the driver on any GPU that is not older; code ending in a letter runs on exactly one."""
    if torch.version.hip:
        return True  # AMD's names are of another kind; there torch says what it lacks
    major, minor = torch.cuda.get_device_capability(number)
    for kind, first, step, exact in re.findall(r"(sm|compute)_(\d+)(\d)([a-z]?)", " ".join(torch.cuda.get_arch_list())):
        of = (int(first), int(step))
        if of == (major, minor) or (not exact and of <= (major, minor) and (kind == "compute" or of[0] == major)):
            return True
    return False


def _no_code_for(number: int) -> str:
    major, minor = torch.cuda.get_device_capability(number)
    return (
        f"torch {torch.__version__} has no code for {torch.cuda.get_device_name(number)} (compute capability "
        f"{major}.{minor}); it has code for {' '.join(torch.cuda.get_arch_list())}"
    )
