"""Inductor's code for cards that are not there: `python -m bench.cuda_dry`, with a CUDA build of torch and no driver.

The engine is built on a fake card of each compute capability and compiled as a worker does, up to the cubins, which
nothing launches. Each row: graphs, kernels that ptxas has compiled, whether the deterministic flag held when code was
generated, graphs that other sizes added, and seconds.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import cycle
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch._dynamo.device_interface import CudaInterface
from torch._inductor import config
from torch._inductor.compile_fx import compile_fx
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime import triton_helpers
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.runtime.triton_heuristics import CachingAutotuner
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _triton

from bench.support.comparison import make_request
from bench.support.fake_card import CARD, fake_card
from bench.support.geometry import Layers, flux
from bench.support.report import make_parser, print_table, write_json
from pipelines.engine.base import EngineInfo
from pipelines.engine.flux import FluxEngine
from pipelines.engine.options import EngineOptions
from pipelines.optimize.apply import apply_optimizations
from pipelines.optimize.context import OptimizationContext
from pipelines.optimize.optimizations import select_optimizations
from weights.formats.fp8_linear import Float8Linear, use_float8_linears

CAPABILITIES = {"9.0": (132, 232448), "8.9": (128, 101376), "8.0": (108, 166912)}  # processors, bytes of shared memory
FLOAT8 = "float8"  # beside optimizations: the placement
ANSWERS = (_triton.has_triton, _triton.triton_backend, DeviceProperties.create)
FEW = Layers(double=2, single=3, t5=1, clip=1)


@dataclass
class Inductor:
    """The real compiler, whose results nothing can run: the graph itself runs, on fake tensors."""

    graphs: int = 0
    kernels: int = 0
    deterministic: list[bool] = field(default_factory=list)

    def __call__(
        self, graph: torch.fx.GraphModule, inputs: Sequence[torch.Tensor], options: Mapping[str, Any]
    ) -> Callable[..., object]:
        compile_fx(graph, list(inputs), config_patches=dict(options))
        self.graphs += 1  # not before: where it finds out more about a number, Dynamo begins anew
        return graph.forward


@contextmanager
def card_for_inductor(inductor: Inductor, name: str) -> Iterator[None]:
    """What Inductor and Triton ask a driver for, as of a card with the compute capability `name`."""
    from triton.backends.compiler import GPUTarget  # type: ignore[import-not-found]
    from triton.runtime import driver  # type: ignore[import-not-found]

    processors, shared = CAPABILITIES[name]
    major, minor = map(int, name.split("."))
    properties = SimpleNamespace(
        name="no card",
        major=major,
        minor=minor,
        multi_processor_count=processors,
        total_memory=80 * 2**30,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048 if minor == 0 else 1536,
        max_threads_per_block=1024,
        warp_size=32,
        shared_memory_per_block_optin=shared,
    )
    target = GPUTarget("cuda", 10 * major + minor, 32)
    active = SimpleNamespace(
        get_current_target=lambda: target,
        get_current_device=lambda: 0,
        get_active_torch_device=lambda: CARD,
        get_device_interface=lambda: torch.cuda,
        is_active=lambda: True,
        utils=SimpleNamespace(get_device_properties=lambda _: {"max_shared_mem": shared}),
    )
    codegen = GraphLowering.codegen

    def record(self: GraphLowering) -> Any:
        inductor.deterministic.append(bool(config.deterministic))
        return codegen(self)

    def precompile(self: CachingAutotuner, *_: Any, **__: Any) -> None:
        """Compile every configuration to a cubin; nothing could load it."""
        self._precompile_worker()  # type: ignore[no-untyped-call]
        inductor.kernels += len(self.compile_results)

    with ExitStack() as stack:
        for where, what, value in (
            (torch.cuda, "get_device_properties", lambda _=None: properties),
            (torch.cuda, "is_available", lambda: True),
            (torch.cuda, "_lazy_init", lambda: None),
            (torch.cuda, "_exchange_device", lambda _: 0),
            (torch.cuda, "_maybe_exchange_device", lambda _: 0),
            (FakeTensorMode, "avoid_device_init", True),
            (torch.cuda, "get_rng_state", lambda *_: torch.zeros(16, dtype=torch.uint8)),
            (torch.cuda, "set_rng_state", lambda *_: None),
            (torch.cuda, "device_count", lambda: 1),
            (torch.cuda, "current_device", lambda: 0),
            (CudaInterface, "get_device_properties", staticmethod(lambda _=None: properties)),
            (CudaInterface, "get_compute_capability", staticmethod(lambda _=None: 10 * major + minor)),
            (CudaInterface, "is_available", staticmethod(lambda: True)),
            (CudaInterface, "is_triton_capable", staticmethod(lambda _=None: True)),
            (CudaInterface, "raise_if_triton_unavailable", staticmethod(lambda _=None: None)),
            (CudaInterface.Worker, "get_device_properties", staticmethod(lambda _=None: properties)),
            (CudaInterface.Worker, "current_device", staticmethod(lambda: 0)),
            (triton_helpers, "set_driver_to_gpu", lambda: None),
            (GraphLowering, "codegen", record),
            (CachingAutotuner, "precompile", precompile),
            (driver, "_active", active),
        ):
            stack.enter_context(patch.object(where, what, value))
        stack.enter_context(config.patch(compile_threads=1, force_disable_caches=True))
        for known in ANSWERS:  # of the card before
            known.cache_clear()
            stack.callback(known.cache_clear)
        yield


def place_in_float8(transformer: Any) -> None:
    """Store the blocks' weights as the placement `float8` does."""
    with torch.device(CARD):
        use_float8_linears(transformer)
    for layer in transformer.modules():
        if isinstance(layer, Float8Linear) and layer.bias is not None:
            layer.bias = torch.nn.Parameter(layer.bias.to(torch.bfloat16), requires_grad=False)


def generate(name: str, optimizations: Sequence[str], sizes: int) -> dict[str, Any]:
    """One row: the engine on a fake card of the capability `name`, warmed up, and then other sizes."""
    torch._dynamo.reset()
    inductor, start = Inductor(), time.perf_counter()
    major, minor = map(int, name.split("."))
    with fake_card((major, minor)) as card, ExitStack() as stack:
        options = EngineOptions(EngineInfo("flux", str(CARD), "bfloat16", ""), text_tokens=512)
        pipeline = flux(torch.bfloat16, CARD, FEW).pipeline
        if FLOAT8 in optimizations:
            place_in_float8(pipeline.transformer)
        engine = FluxEngine(pipeline, options)
        stack.enter_context(card_for_inductor(inductor, name))
        wanted = [one for one in select_optimizations(optimizations, "cuda") if one != "attention"]
        engine, applied = apply_optimizations(engine, wanted, wanted, context=OptimizationContext(inductor))
        warm = inductor.graphs
        shapes = [(width, height) for width in range(512, 1537, 128) for height in range(512, 1537, 224)][:sizes]
        for (width, height), preset in zip(shapes, cycle(["none", "high"]), strict=False):
            (sample,) = engine.prepare(make_request(width, height, 28, preset))
            engine.step([sample])
        assert not [wait for wait in card.waits if wait.startswith("flux.step")]
    return {
        "capability": name,
        "optimizations": ",".join(optimizations),
        "graphs": warm,
        "kernels": inductor.kernels,
        "deterministic": all(inductor.deterministic) and bool(inductor.deterministic),
        "recompiles": inductor.graphs - warm,
        "sizes": len(shapes),
        "failed": dict(applied.failed),
        "seconds": time.perf_counter() - start,
    }


def main() -> None:
    parser: argparse.ArgumentParser = make_parser("cuda_dry", __doc__)
    parser.add_argument("--capabilities", default=",".join(CAPABILITIES))
    parser.add_argument("--optimizations", default="default;default,fp8;default,float8", help="sets, separated by ;")
    parser.add_argument("--sizes", type=int, default=40)
    options = parser.parse_args()
    rows = []
    for name in options.capabilities.split(","):
        for names in options.optimizations.split(";"):
            rows.append(generate(name, names.split(","), options.sizes))
            print(rows[-1], flush=True)
    print_table(f"torch {torch.__version__}", tuple(rows[0]), [[str(value) for value in row.values()] for row in rows])
    write_json(rows, options.json)


if __name__ == "__main__":
    main()
