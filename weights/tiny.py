"""The model `tiny`: a FLUX of two layers with random weights, built in code. It draws coloured noise.

With it the whole path (tokenizers, both text encoders, transformer, scheduler and VAE, all of the real classes) runs in
seconds on a CPU. The weights are the same on every machine.
"""

from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

TEXT_TOKENS = 64
WIDTH = 32  # of all hidden states
SEED = 20250917
TRANSFORMER = {
    "in_channels": 64,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": WIDTH,
    "pooled_projection_dim": WIDTH,
    "guidance_embeds": True,
    "axes_dims_rope": (4, 6, 6),
}
SCHEDULER = {  # FLUX.1 [dev]'s own
    "use_dynamic_shifting": True,
    "shift": 3.0,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}
VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (8, 8, 16, 16),
    "layers_per_block": 1,
    "latent_channels": 16,
    "norm_num_groups": 8,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "mid_block_add_attention": False,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
}


def build(dtype: torch.dtype = torch.float32, **overrides: Any) -> FluxPipeline:
    """The pipeline in evaluation mode on the CPU. `overrides` change the transformer's configuration."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        clip_tokens = byte_tokenizer("<|startoftext|>", "<|endoftext|>", "<pad>", TEXT_TOKENS)
        t5_tokens = byte_tokenizer(None, "</s>", "<pad>", TEXT_TOKENS)
        clip, t5 = clip_encoder(clip_tokens), t5_encoder(t5_tokens)
        transformer, vae = FluxTransformer2DModel(**(TRANSFORMER | overrides)), AutoencoderKL(**VAE)
    for part in (clip, t5, transformer, vae):
        part.eval().requires_grad_(False).to(dtype)
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULER),
        vae=vae,
        text_encoder=clip,
        tokenizer=clip_tokens,
        text_encoder_2=t5,
        tokenizer_2=t5_tokens,
        transformer=transformer,
    )


def clip_encoder(tokens: PreTrainedTokenizerFast) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokens),
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            projection_dim=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=TEXT_TOKENS,
            bos_token_id=tokens.bos_token_id,
            eos_token_id=tokens.eos_token_id,
            pad_token_id=tokens.pad_token_id,
        )
    )


def t5_encoder(tokens: PreTrainedTokenizerFast) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokens),
            d_model=WIDTH,
            d_kv=16,
            d_ff=2 * WIDTH,
            num_layers=2,
            num_heads=2,
            feed_forward_proj="gated-gelu",
            eos_token_id=tokens.eos_token_id,
            pad_token_id=tokens.pad_token_id,
        )
    )


def byte_tokenizer(start: str | None, end: str, pad: str, length: int) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges: it has a token for every byte, so no text is unknown to it."""
    specials = [pad, end, *([start] if start else []), "<unk>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*specials, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}" if start else f"$A {end}",
        special_tokens=[(token, vocabulary[token]) for token in (start, end) if token],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=start,
        eos_token=end,
        pad_token=pad,
        unk_token="<unk>",
        model_max_length=length,
    )
