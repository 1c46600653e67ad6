"""What Inductor, Triton and torch ask a CUDA driver for, answered for a card that is not there.

Code is generated and compiled to cubins by the real compilers; nothing can launch it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
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

from bench.support.cards import Card, choose_attention

ANSWERS = (_triton.has_triton, _triton.triton_backend, DeviceProperties.create)
CODEGEN = GraphLowering.codegen
CUDNN = torch._C._ConvBackend.Cudnn  # type: ignore[attr-defined]


@dataclass
class Inductor:
    """The real compiler, whose results nothing can run: the graph itself runs, on fake tensors."""

    card: Card
    graphs: int = 0
    kernels: int = 0
    deterministic: list[bool] = field(default_factory=list)

    def __call__(
        self, graph: torch.fx.GraphModule, inputs: Sequence[torch.Tensor], options: Mapping[str, Any]
    ) -> Callable[..., object]:
        choose_attention(graph, self.card)
        compile_fx(graph, list(inputs), config_patches=dict(options))
        self.graphs += 1  # not before: where it finds out more about a number, Dynamo begins anew
        return graph.forward

    def generate(self, graph: GraphLowering) -> Any:
        """In the place of `GraphLowering.codegen`."""
        self.deterministic.append(bool(config.deterministic))
        return CODEGEN(graph)

    def compile(self, kernel: CachingAutotuner) -> None:
        """In the place of `CachingAutotuner.precompile`: every configuration to a cubin, and none is loaded."""
        kernel._precompile_worker()  # type: ignore[no-untyped-call]
        self.kernels += len(kernel.compile_results)


@contextmanager
def card_for_inductor(inductor: Inductor) -> Iterator[None]:
    """What the compilers ask a driver for is answered as the compiler's card would."""
    from triton.runtime import driver  # type: ignore[import-not-found]

    properties = inductor.card.properties
    capability = 10 * inductor.card.major + inductor.card.minor
    with ExitStack() as stack:
        for where, what, value in (
            (torch.cuda, "get_device_properties", lambda _=None: properties),
            (torch.cuda, "is_available", lambda: True),
            (torch.cuda, "_lazy_init", lambda: None),
            (torch.cuda, "_exchange_device", lambda _: 0),
            (torch.cuda, "_maybe_exchange_device", lambda _: 0),
            (torch.cuda, "get_rng_state", lambda *_: torch.zeros(16, dtype=torch.uint8)),
            (torch.cuda, "set_rng_state", lambda *_: None),
            (torch.cuda, "device_count", lambda: 1),
            (torch.cuda, "current_device", lambda: 0),
            # It would be `Slow2d`, which keeps another order in memory.
            (torch._C, "_select_conv_backend", lambda *_, **__: CUDNN),
            (CudaInterface, "get_device_properties", staticmethod(lambda _=None: properties)),
            (CudaInterface, "get_compute_capability", staticmethod(lambda _=None: capability)),
            (CudaInterface, "is_available", staticmethod(lambda: True)),
            (CudaInterface, "is_triton_capable", staticmethod(lambda _=None: True)),
            (CudaInterface, "raise_if_triton_unavailable", staticmethod(lambda _=None: None)),
            (CudaInterface.Worker, "get_device_properties", staticmethod(lambda _=None: properties)),
            (CudaInterface.Worker, "current_device", staticmethod(lambda: 0)),
            (FakeTensorMode, "avoid_device_init", True),
            (triton_helpers, "set_driver_to_gpu", lambda: None),
            (GraphLowering, "codegen", lambda graph: inductor.generate(graph)),
            (CachingAutotuner, "precompile", lambda kernel, *_, **__: inductor.compile(kernel)),
            (driver, "_active", inductor.card.driver),
        ):
            stack.enter_context(patch.object(where, what, value))
        stack.enter_context(config.patch(compile_threads=1, force_disable_caches=True))
        for known in ANSWERS:  # of the card before
            known.cache_clear()
            stack.callback(known.cache_clear)
        yield
