"""Parts that wait in the host's memory: their layers come to the card as they compute (diffusers' group offloading).

Where they wait changes no bit: the same kernels run on the same device. On CUDA the next layer is copied while this one
computes, from pinned memory. Single layers rather than blocks, as our forward calls submodules, and not always all.
"""

from collections.abc import Iterable
from typing import Any

import torch
from diffusers import FluxPipeline
from diffusers.hooks import apply_group_offloading


def stream(pipeline: FluxPipeline, parts: Iterable[str], device: torch.device) -> None:
    """Let these parts, which are in the host's memory, compute on `device`."""
    for name in parts:
        part = getattr(pipeline, name)
        apply_group_offloading(part, device, offload_type="leaf_level", use_stream=device.type == "cuda")
        if name == "transformer":
            show_order(part, device)


@torch.inference_mode()
def show_order(transformer: Any, device: torch.device) -> None:
    """One pass of one token through the model's own `forward`: copying ahead goes by the order of layers seen in it."""
    config, dtype = transformer.config, transformer.dtype

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, device=device, dtype=dtype)

    transformer(
        hidden_states=zeros(1, 1, config.in_channels),
        encoder_hidden_states=zeros(1, 1, config.joint_attention_dim),
        pooled_projections=zeros(1, config.pooled_projection_dim),
        timestep=zeros(1),
        guidance=zeros(1) if config.guidance_embeds else None,
        img_ids=zeros(1, 3),
        txt_ids=zeros(1, 3),
    )
