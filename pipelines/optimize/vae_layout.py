"""The order of the VAE's values in memory."""

import torch

from pipelines.engine.flux import FluxEngine
from pipelines.engine.options import EngineOptions
from pipelines.optimize.context import Change, OptimizationContext


def use_channels_last(engine: FluxEngine, _: OptimizationContext) -> Change:
    """Store the weights as cuDNN's fast convolutions want them."""
    engine.pipeline.vae.to(memory_format=torch.channels_last)
    return Change(engine.options)


def use_contiguous(engine: FluxEngine) -> EngineOptions:
    """Store the weights in torch's own order again."""
    engine.pipeline.vae.to(memory_format=torch.contiguous_format)
    return engine.options
