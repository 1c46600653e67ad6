"""Parts in the host's memory: each layer is copied to the card when it computes (diffusers' group offloading).

Offloading changes no bit: the same kernels run on the same device. On CUDA the next layer is copied, from pinned
memory, while this one computes. Layers are copied singly, not by block: our forward pass calls submodules itself and
skips some of them.
"""

from collections.abc import Iterable
from typing import Any

import torch
from diffusers import FluxPipeline
from diffusers.hooks import apply_group_offloading


def stream_parts(pipeline: FluxPipeline, parts: Iterable[str], device: torch.device) -> None:
    """Let these parts, which are stored in the host's memory, compute on `device`."""
    for name in parts:
        part = getattr(pipeline, name)
        apply_group_offloading(part, device, offload_type="leaf_level", use_stream=device.type == "cuda")
        if name == "transformer":
            trace_layer_order(part, device)


@torch.inference_mode()
def trace_layer_order(transformer: Any, device: torch.device) -> None:
    """Pass one token through the model's own `forward`: copying ahead follows the order of layers in this pass."""
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
