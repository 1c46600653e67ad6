"""A compiler that only looks, and torch's settings as they were before something was compiled."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch


class Counting:
    """A compiler that compiles nothing, and keeps the graphs and options it was given."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []
        self.options: list[Mapping[str, object]] = []

    def __call__(
        self, graph: torch.fx.GraphModule, _: list[torch.Tensor], options: Mapping[str, object]
    ) -> Callable[..., object]:
        self.graphs.append(graph)
        self.options.append(options)
        return graph.forward


@contextmanager
def torch_as_it_was() -> Iterator[None]:
    """Attention backends, limits and stances are the process's: after this context they are what they were."""
    import torch.fx.experimental._config as shapes
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as Registry

    torch._dynamo.reset()
    duck = shapes.use_duck_shape
    limits = (torch._dynamo.config.recompile_limit, torch._dynamo.config.accumulated_recompile_limit)
    backend, _ = Registry.get_active_backend()
    yield
    Registry.set_active_backend(backend)
    torch._dynamo.config.recompile_limit, torch._dynamo.config.accumulated_recompile_limit = limits
    shapes.use_duck_shape = duck
    torch.compiler.set_stance("default")
    torch._dynamo.reset()
