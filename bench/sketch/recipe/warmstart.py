"""Starts a training from an earlier edition's weights, whose text side read sub-words of whole captions.

The transformer is taken as it is. The new words' rows are the states that the earlier text encoder gave the same things
in a caption; T5's layers begin as the identity, and CLIP is fitted to the earlier one's pooled output.
"""

from pathlib import Path

import numpy as np
import torch
from diffusers import FluxPipeline

from bench.sketch.recipe.atlas import Atlas
from bench.sketch.recipe.concepts import BACKGROUNDS, CONCEPTS, Concept
from bench.sketch.recipe.data import Scene, make_scene
from bench.sketch.recipe.flow import Painter
from bench.sketch.recipe.layouts import PLACES
from bench.sketch.recipe.text import make_ids
from bench.sketch.recipe.words import END, PAD, PARTS, REGISTERS, SummedEmbedding

FIT_STEPS, FIT_BATCH = 400, 32
ROWS_SCALE = 2000  # of T5's states, which its last norm takes out: at their own size no learning rate moves them
SAMPLES = 12  # things over which what a colour or a place adds is averaged


class EarlierText:
    """The earlier edition's text encoders."""

    def __init__(self, pipeline: FluxPipeline) -> None:
        self.pipeline = pipeline
        self.knows = {name for name in pipeline.tokenizer.get_vocab() if name}
        self._norm = pipeline.text_encoder_2.encoder.final_layer_norm

    @torch.no_grad()
    def states(self, caption: str) -> tuple[torch.Tensor, list[str]]:
        """T5's states before its last norm, `(32, width)`, and the tokens."""
        tokenizer, kept = self.pipeline.tokenizer_2, list[torch.Tensor]()
        ids = tokenizer(caption, padding="max_length", max_length=32, return_tensors="pt").input_ids
        hook = self._norm.register_forward_pre_hook(lambda _module, inputs: kept.append(inputs[0]))
        self.pipeline.text_encoder_2(ids)
        hook.remove()
        return kept[0][0] / ROWS_SCALE, tokenizer.convert_ids_to_tokens(ids[0].tolist())

    def last_state(self, caption: str, word: str) -> torch.Tensor:
        """The state of the last token of `word`, which stands in the caption."""
        tokenizer = self.pipeline.tokenizer_2
        before = tokenizer(caption[: caption.index(word) + len(word)], add_special_tokens=False).input_ids
        return self.states(caption)[0][len(before) - 1]

    @torch.no_grad()
    def pooled(self, captions: list[str]) -> torch.Tensor:
        ids = self.pipeline.tokenizer(captions, padding="max_length", max_length=32, return_tensors="pt").input_ids
        pooled: torch.Tensor = self.pipeline.text_encoder(ids).pooler_output
        return pooled


def start_from(painter: Painter, model: Path, known: int, atlas: Atlas) -> None:
    """`known` of the concepts, the first ones, were known to the model in that folder."""
    pipeline = FluxPipeline.from_pretrained(model, dtype=torch.float32, local_files_only=True)
    earlier, old = EarlierText(pipeline), CONCEPTS[:known]
    painter.transformer.load_state_dict(pipeline.transformer.state_dict())
    with torch.no_grad():
        for name, module in painter.t5.named_modules():
            if name.endswith((".o", ".wo")):
                module.weight.zero_()
        painter.t5.encoder.final_layer_norm.weight.copy_(pipeline.text_encoder_2.encoder.final_layer_norm.weight)
        set_rows(painter.t5.get_input_embeddings(), earlier, old, atlas)
    fit_clip(painter, earlier, pipeline, old)


def set_rows(embedding: SummedEmbedding, earlier: EarlierText, old: list[Concept], atlas: Atlas) -> None:
    rows = {
        concept.name: earlier.last_state(f"a {concept.name} on a white background", concept.name) for concept in old
    }
    for concept in CONCEPTS[len(old) :]:
        like = rows[nearest(concept, old, atlas).name]
        rows[concept.name] = like + 0.3 * like.std() * torch.randn_like(like)
    for name, row in rows.items():
        embedding.parts[PARTS[f"thing {name}"]] = row
    spread = torch.stack(list(rows.values())).std()
    some = old[:: max(1, len(old) // SAMPLES)]
    for part, number in PARTS.items():
        kind, _, name = part.partition(" ")
        if kind == "slot" and name in PLACES:
            changed = [earlier.last_state(f"a {c.name} on the {name}", c.name) - rows[c.name] for c in some]
            embedding.parts[number] = torch.stack(changed).mean(0)
        elif kind == "slot":
            embedding.parts[number] = 0.1 * spread * torch.randn_like(embedding.parts[0])
        elif kind == "colour":
            changed = [
                earlier.last_state(f"a {name} {c.name} on a white background", c.name) - rows[c.name]
                for c in old
                if c.colourable
            ]
            embedding.parts[number] = torch.stack(changed).mean(0)
        elif kind == "ground" and name in BACKGROUNDS:
            changed = [earlier.last_state(f"a {c.name} on a {name} background", name) for c in some]
            embedding.parts[number] = torch.stack(changed).mean(0)
        elif kind == "ground":
            embedding.parts[number] = spread * torch.randn_like(embedding.parts[0])
    states, tokens = earlier.states("a cat on a white background")
    end = tokens.index("<|endoftext|>")
    embedding.parts[PARTS[END]], embedding.parts[PARTS[PAD]] = states[end], states[end + 4]
    for register, position in zip(REGISTERS, (0, end - 1, end + 1, end + 8, 24, 31), strict=True):
        embedding.parts[PARTS[register]] = states[position]


def nearest(concept: Concept, among: list[Concept], atlas: Atlas) -> Concept:
    """The concept whose icon looks most alike."""

    def small(each: Concept) -> np.ndarray:
        return atlas.picture(each, None, 32)

    picture = small(concept)
    return min(among, key=lambda other: float(((small(other) - picture) ** 2).sum()))


def fit_clip(painter: Painter, earlier: EarlierText, pipeline: FluxPipeline, old: list[Concept]) -> None:
    state = {name: value for name, value in pipeline.text_encoder.state_dict().items() if "embeddings." not in name}
    painter.clip.load_state_dict(state, strict=False)
    optimizer = torch.optim.Adam(painter.clip.parameters(), lr=2e-3)
    rng, names = np.random.default_rng(1), {concept.name for concept in old}
    for step in range(FIT_STEPS):
        scenes = list[Scene]()
        while len(scenes) < FIT_BATCH:
            scene = make_scene(rng)
            if scene.things and scene.background in BACKGROUNDS and names >= {t.concept.name for t in scene.things}:
                scenes.append(scene)
        ids = torch.tensor([make_ids(scene.words)[0] for scene in scenes])
        wanted = earlier.pooled([scene.caption for scene in scenes])
        loss = (painter.clip(ids).pooler_output - wanted).pow(2).mean() / wanted.pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 99:
            print(f"clip fit {step + 1} {loss.item():.3f}", flush=True)
    painter.clip.zero_grad(set_to_none=True)
