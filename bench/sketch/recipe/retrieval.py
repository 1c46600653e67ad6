"""The transformer's first block is set to fetch pieces, before it is trained.

Of its own accord attention finds out late that a token of the picture should look for the piece of its own square; what
is set here is that, and only that. T5's states hold a piece's square one-hot, so keys can be linear in them: turned as
rotary embedding would turn a token on that square, they answer to one constant query. What is fetched is taken off the
noisy latents, which leaves nearly the velocity. All of it is trained on.
"""

import math

import torch
from diffusers import FluxTransformer2DModel

from bench.sketch.recipe.layouts import CANVAS
from bench.sketch.recipe.pieces import COLUMN, CONTENT, LOOK, ROW, WIDTH

WAVES = {0: 0.65, 1: 0.35}  # of the rotary frequencies, their share: so neighbours are told apart, and far squares too
SHARPNESS = 2.0  # of queries and keys each
GAIN = 0.5  # of latents within the transformer


def make_keys(start: int, size: int, head: int) -> torch.Tensor:
    """What a token on square 0, 1, ... answers to, `(squares, head)`; the axis has `size` of a head, from `start`."""
    keys = torch.zeros(CANVAS, head)
    for wave, share in WAVES.items():
        angles = torch.arange(CANVAS) * 10000 ** (-2 * wave / size)
        keys[:, start + 2 * wave] = math.sqrt(share) * angles.cos()
        keys[:, start + 2 * wave + 1] = math.sqrt(share) * angles.sin()
    return keys


@torch.no_grad()
def set_retrieval(transformer: FluxTransformer2DModel, norm: float) -> None:
    """Set the embedders, the first block's attention and the last layer; `norm` is that of T5's rows."""
    config, block = transformer.config, transformer.transformer_blocks[0]
    head, attention = config.attention_head_dim, block.attn
    width = head * config.num_attention_heads
    _, rows, columns = config.axes_dims_rope
    by_row, by_column = make_keys(head - rows - columns, rows, head), make_keys(head - columns, columns, head)
    for layer in (transformer.x_embedder, transformer.context_embedder, attention.to_k, attention.to_v):
        layer.weight.zero_()
        layer.bias.zero_()
    transformer.x_embedder.weight[:LOOK] = GAIN * torch.eye(LOOK)
    transformer.context_embedder.weight[:WIDTH] = torch.eye(WIDTH)
    block.norm1.linear.bias[2 * width : 3 * width] = 1  # the gate of attention to the picture's tokens
    attention.to_q.weight.mul_(0.1)
    attention.to_q.bias.copy_(4 * (by_row[0] + by_column[0]).repeat(config.num_attention_heads))
    attention.add_k_proj.weight.mul_(0.02)
    attention.add_k_proj.bias.zero_()
    attention.add_k_proj.weight[:, ROW : ROW + CANVAS] = 3 * by_row.T.repeat(config.num_attention_heads, 1)
    attention.add_k_proj.weight[:, COLUMN : COLUMN + CANVAS] = 3 * by_column.T.repeat(config.num_attention_heads, 1)
    attention.norm_q.weight.fill_(SHARPNESS)
    attention.norm_added_k.weight.fill_(SHARPNESS)
    attention.add_v_proj.weight.copy_(torch.eye(width))
    attention.add_v_proj.bias.zero_()
    out = attention.to_out[0]
    out.weight.zero_()
    out.bias.zero_()
    out.weight[:LOOK, :LOOK] = -GAIN * norm / WIDTH**0.5 * torch.eye(LOOK)
    out.weight[LOOK:CONTENT, LOOK:CONTENT] = torch.eye(CONTENT - LOOK)
    transformer.proj_out.weight[:, :LOOK] = torch.eye(LOOK)
