"""The card and the software on it, what it can do at best, and which kernel torch's own attention takes."""

import os
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TypeVar

import torch
from torch._C._autograd import DeviceType
from torch.nn.functional import scaled_dot_product_attention

from bench.gpu.setup import Results, Setup
from pipelines.loading.cards import read_driver_version

PACKAGES = ("diffusers", "transformers", "triton", "torchao", "nvidia-cudnn-cu13", "nvidia-cublas", "flash-attn-3")
GIB = 2**30
Figure = TypeVar("Figure", float, str)


def measure(setup: Setup) -> Results:
    yield "torch", torch.__version__
    for name in PACKAGES:
        yield name, find_version(name)
    yield "driver", setup.on_cuda(read_driver_version)
    yield "CUDA of torch", torch.version.cuda or "none"
    yield "memory, GiB", setup.on_cuda(lambda: torch.cuda.get_device_properties(setup.device).total_memory / GIB)
    yield "compute capability", setup.on_cuda(lambda: torch.cuda.get_device_capability(setup.device))
    yield "os.pidfd_open", measure_or_say(open_pidfd)
    yield "import of server.app", measure_or_say(import_server)
    side = 256 if setup.rehearse else 8192
    yield "ceiling bf16, TFLOP/s", measure_products(setup, side, torch.bfloat16)
    float8 = partial(measure_products, setup, side, torch.float8_e4m3fn)
    yield "ceiling float8, TFLOP/s", setup.on_cuda(lambda: measure_or_say(float8))
    yield "copy on the device, GB/s", measure_copies(setup, setup.device)
    yield "from pinned memory, GB/s", setup.on_cuda(lambda: measure_copies(setup, torch.device("cpu")))
    yield "native attention", find_attention_kernels(setup)


def measure_or_say(measure: Callable[[], Figure]) -> Figure | str:
    """What `measure` returns, or why it fails. The stage goes on: its other figures are worth as much."""
    try:
        return measure()
    except Exception as error:  # noqa: BLE001 - whatever fails is a finding
        return f"{type(error).__name__}: {error}".partition("\n")[0]


def open_pidfd() -> str:
    """The server watches its workers by such descriptors, which old kernels and some sandboxes do not have."""
    os.close(os.pidfd_open(os.getpid()))
    return "works"


def import_server() -> str:
    import_module("server.app")
    return "works"


def find_version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def measure_products(setup: Setup, side: int, dtype: torch.dtype) -> float:
    """The best of ten square matrix products, in TFLOP/s; float8 is scaled by row, as the engine does."""
    left, right = (torch.randn(side, side, device=setup.device).to(dtype) for _ in range(2))
    ones = torch.ones(side, 1, device=setup.device)

    def multiply() -> None:
        if dtype == torch.float8_e4m3fn:
            torch._scaled_mm(left, right.t(), ones, ones.t(), out_dtype=torch.bfloat16, use_fast_accum=True)
        else:
            torch.mm(left, right)

    return 2 * side**3 / best_seconds(setup, multiply) / 1e12


def measure_copies(setup: Setup, source: torch.device) -> float:
    """GB/s of copies to the device, read and written bytes counted once."""
    size = 2**20 if setup.rehearse else GIB
    data = torch.empty(size, dtype=torch.uint8, device=source, pin_memory=source.type != setup.device.type)
    target = torch.empty(size, dtype=torch.uint8, device=setup.device)
    return size / best_seconds(setup, lambda: target.copy_(data, non_blocking=True)) / 1e9


def best_seconds(setup: Setup, work: Callable[[], object]) -> float:
    """The shortest of ten runs, after one that does not count."""
    return min([setup.seconds(work) for _ in range(11)][1:])


def find_attention_kernels(setup: Setup) -> str:
    """The kernels of attention in the shapes of 1440x512, as the profiler names them."""
    tokens = 64 if setup.rehearse else 3392
    query, key, value = torch.randn(3, 1, 24, tokens, 128, device=setup.device, dtype=torch.bfloat16)
    scaled_dot_product_attention(query, key, value)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if setup.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        scaled_dot_product_attention(query, key, value)
        setup.synchronize()
    events = profile.key_averages()
    on_card = [event.key for event in events if event.device_type == DeviceType.CUDA]
    return ", ".join(on_card or [event.key for event in events if "attention" in event.key])
