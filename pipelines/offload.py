"""Parts that wait in the host's memory: their layers come to the card as they compute (diffusers' group offloading).

Where they wait changes no bit: the same kernels run on the same device. On CUDA the next layer is copied while this one
computes, from pinned memory. Single layers rather than blocks, as our forward calls submodules, and not always all.
"""

from collections.abc import Iterable

import torch
from diffusers import FluxPipeline
from diffusers.hooks import apply_group_offloading


def stream(pipeline: FluxPipeline, parts: Iterable[str], device: torch.device) -> None:
    """Let these parts, which are in the host's memory, compute on `device`."""
    for name in parts:
        apply_group_offloading(
            getattr(pipeline, name), device, offload_type="leaf_level", use_stream=device.type == "cuda"
        )
