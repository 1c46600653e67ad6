"""Everything that an engine is built from besides its pipeline. Frozen: a change is a new engine."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from pipelines.engine.base import EngineInfo
from pipelines.engine.canvas import Range
from pipelines.engine.modulation import TransformerVariant
from pipelines.fields import Size
from weights.latent_rgb import LatentRGB


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """The model's own limits, the operator's choices and what optimizations have changed.

    Of the model: `text_tokens` is the number of tokens that T5 reads; `preview` maps latents to colours (None: no
    previews); `guidance` is the range of scales it has learned and `canvas` the size around which it has learned
    pictures (None: all); `words` are the only ones it knows (None: a whole language).
    Of the operator: images of more than `tile_above` megapixels (2^20 pixels) are decoded in tiles (None: never);
    `remarks` are notes that every reply carries.
    Of the optimizations: `variants` are the transformers by preset (a preset that is missing uses the pipeline's own);
    `text_cache` and `rotary_cache` are the numbers of encoded prompts and position tables to keep (0: none);
    `batches` are, by size, the numbers of samples that may share a step (one may always).
    """

    info: EngineInfo
    text_tokens: int
    preview: LatentRGB | None = None
    guidance: Range | None = None
    canvas: Size | None = None
    words: frozenset[str] | None = None
    tile_above: float | None = None
    remarks: tuple[str, ...] = ()
    variants: Mapping[str, TransformerVariant] = field(default_factory=dict)
    text_cache: int = 0
    rotary_cache: int = 0
    batches: Mapping[Size, tuple[int, ...]] = field(default_factory=dict)
