"""The text side: a tiny CLIP and a tiny T5 encoder, trained from scratch together with the transformer.

Their tokenizers hand them whole words that say what is drawn and where (see `grammar` and `words`), so there is hardly
any language left to learn. Nothing is pretrained.
"""

import torch
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from bench.sketch.recipe.words import END, IDS, PAD, REGISTERS, START, TOKENS, VOCABULARY, SummedEmbedding

WIDTH = 128


def make_ids(words: list[str]) -> tuple[list[int], list[int]]:
    """Ids for CLIP and T5, as the tokenizers make and FluxPipeline pads them."""

    def pad(ids: list[int]) -> list[int]:
        return ids + [IDS[PAD]] * (TOKENS - len(ids))

    ids, end = [IDS[word] for word in words], IDS[END]
    return pad([IDS[START], *ids, end]), pad([*ids, *(IDS[register] for register in REGISTERS), end])


def make_encoders() -> tuple[CLIPTextModel, T5EncoderModel]:
    """CLIP: 2 layers. T5: 3 layers."""
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(VOCABULARY),
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            projection_dim=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            bos_token_id=IDS[START],
            eos_token_id=IDS[END],
            pad_token_id=IDS[PAD],
        )
    )
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=len(VOCABULARY),
            d_model=WIDTH,
            d_kv=32,
            d_ff=2 * WIDTH,
            num_layers=3,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            eos_token_id=IDS[END],
            pad_token_id=IDS[PAD],
        )
    )
    clip.set_input_embeddings(SummedEmbedding(WIDTH, 0.3))
    t5.set_input_embeddings(SummedEmbedding(WIDTH, 0.5))
    return clip, t5


def fix_embeddings(clip: CLIPTextModel, t5: T5EncoderModel) -> None:
    """Plain embeddings instead of summed ones, as the classes save and load them."""
    for encoder in (clip, t5):
        table = encoder.get_input_embeddings().table().detach()
        encoder.set_input_embeddings(torch.nn.Embedding(len(table), WIDTH, _weight=table))
