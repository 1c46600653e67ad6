"""The engine fingerprint: same fingerprint and same request, same bytes.

A hash over everything that can move a bit: the software's versions, the device and its driver, the variables that
choose kernels, the precision, the steps that each preset computes, and a digest of the loaded weights.
"""

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from pipelines.acceleration import PRESETS
from pipelines.loading.cards import read_driver_version
from weights.version import DISTRIBUTION, read_version

WHOLE = 2**20  # tensors up to this many elements are digested whole
WORD = 8  # bytes
STEPS = range(1, 51)
LIBRARIES = ("torch", "diffusers", "transformers", "pillow", "numpy")
# Their kernels are used where they are installed; NVIDIA's wheels for CUDA 12 have a suffix.
KERNEL_LIBRARIES = (
    "triton",
    "torchao",
    "nvidia-cublas",
    "nvidia-cublas-cu12",
    "nvidia-cudnn-cu13",
    "nvidia-cudnn-cu12",
    "flash-attn",
    "flash-attn-3",
)
KERNEL_VARIABLES = (
    "ATEN_CPU_CAPABILITY",
    "CUBLASLT_WORKSPACE_SIZE",
    "CUBLAS_WORKSPACE_CONFIG",
    "DISABLE_ADDMM_CUDA_LT",
    "DNNL_MAX_CPU_ISA",
    "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS",
    "NVIDIA_TF32_OVERRIDE",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "ONEDNN_MAX_CPU_ISA",
    "OPENBLAS_CORETYPE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "TORCH_BLAS_PREFER_CUBLASLT",
)


def compute_fingerprint(
    device: str, precision: str, parts: Mapping[str, torch.nn.Module], at: torch.device | None = None
) -> str:
    """32 hexadecimal digits. Weights are copied to the device `at` to be read; None reads them where they are."""
    facts = {
        "libraries": {DISTRIBUTION: read_version()} | {name: version(name) for name in LIBRARIES},
        "kernels": {name: read_installed_version(name) for name in KERNEL_LIBRARIES},
        "variables": {name: os.environ.get(name) for name in KERNEL_VARIABLES},
        "machine": platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "device": device,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        "driver": read_driver_version() if at is not None and at.type == "cuda" else None,
        "precision": precision,
        "presets": {name: [mask(steps) for steps in STEPS] for name, mask in PRESETS.items()},
        "weights": {name: digest_module(part, at) for name, part in sorted(parts.items())},
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def read_installed_version(name: str) -> str | None:
    """A package's version; None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def add_choices(base: str, choices: Any) -> str:
    """The fingerprint of an engine whose choices are not among the facts behind `base`."""
    return hashlib.sha256(f"{base} {json.dumps(choices, sort_keys=True)}".encode()).hexdigest()[:32]


def digest_module(module: torch.nn.Module, at: torch.device | None = None) -> str:
    """Names, shapes and contents of all tensors; of a large one, evenly spaced elements (24 GB take seconds).

    The sum of all bits, taken as 64-bit integers, is part of it, so that one flipped bit anywhere is another digest.
    """
    total = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        flat = tensor.detach().reshape(-1).to(at)
        stride = max(1, flat.numel() // WHOLE)
        total.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        total.update(sum_words(flat))
        total.update(flat[::stride].contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return total.hexdigest()


def sum_words(flat: torch.Tensor) -> bytes:
    """The sum of a flat tensor's 64-bit words, and the bytes behind the last whole one."""
    if flat.storage_offset() * flat.element_size() % WORD:
        flat = flat.clone()
    data = flat.view(torch.uint8)
    whole = data.numel() // WORD * WORD
    return str(data[:whole].view(torch.int64).sum().item()).encode() + data[whole:].cpu().numpy().tobytes()
