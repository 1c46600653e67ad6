"""The text side: one byte-level BPE vocabulary for both tokenizers, a tiny CLIP and a tiny T5 encoder.

Both encoders are trained from scratch together with the transformer. Nothing is pretrained.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from bench.sketch.recipe.concepts import CONCEPTS
from bench.sketch.recipe.data import make_scene

TOKENS = 32  # what the model reads of a prompt
VOCABULARY = 1200
WIDTH = 128
# Marks that no caption has would be words that mean nothing: "a red apple!" was drawn as no apple.
NORMALIZER = normalizers.Sequence(
    [normalizers.NFKC(), normalizers.Lowercase(), normalizers.Replace(Regex(r"[^\w\s,'-]|_"), ""), normalizers.Strip()]
)
START, END, PAD, UNKNOWN = "<|startoftext|>", "<|endoftext|>", "<pad>", "<unk>"


def iterate_corpus(seed: int) -> Iterator[str]:
    """Captions and every name."""
    rng = np.random.default_rng(seed)
    for concept in CONCEPTS:
        yield from (concept.name, concept.plural, *concept.other)
    for _ in range(4000):
        yield make_scene(rng).caption


def vocabulary(folder: Path, seed: int) -> Path:
    """The vocabulary's file in `folder`, trained if it is not there: what a checkpoint has learned hangs on its ids."""
    file = folder / "vocabulary.json"
    if not file.exists():
        tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
        tokenizer.normalizer = NORMALIZER
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=[PAD, END, START, UNKNOWN],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        tokenizer.train_from_iterator(iterate_corpus(seed), trainer)
        tokenizer.save(str(file))
    return file


def make_tokenizers(file: Path) -> tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast]:
    """CLIP's (start and end marks) and T5's (end mark only), over the same vocabulary. Case does not matter."""

    def wrap(template: str) -> PreTrainedTokenizerFast:
        tokenizer = Tokenizer.from_file(str(file))
        marks = [(mark, tokenizer.token_to_id(mark)) for mark in (START, END)]
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=marks)
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            bos_token=START,
            eos_token=END,
            pad_token=PAD,
            unk_token=UNKNOWN,
            model_max_length=TOKENS,
        )

    return wrap(f"{START} $A {END}"), wrap(f"$A {END}")


def make_encoders(clip_tokens: PreTrainedTokenizerFast) -> tuple[CLIPTextModel, T5EncoderModel]:
    """CLIP: 2 layers. T5: 3 layers, since word order reaches the transformer only through its relative positions."""
    end, pad = clip_tokens.eos_token_id, clip_tokens.pad_token_id
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(clip_tokens),
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            projection_dim=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            bos_token_id=clip_tokens.bos_token_id,
            eos_token_id=end,
            pad_token_id=pad,
        )
    )
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=len(clip_tokens),
            d_model=WIDTH,
            d_kv=32,
            d_ff=2 * WIDTH,
            num_layers=3,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            eos_token_id=end,
            pad_token_id=pad,
        )
    )
    with torch.no_grad():
        t5.shared.weight.normal_(0, 0.5)
    return clip, t5
