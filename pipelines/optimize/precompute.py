"""What is computed once and looked up afterwards: prompt embeddings, position tables, modulation vectors."""

from collections.abc import Callable
from dataclasses import replace

from pipelines.engine.flux import FluxEngine
from pipelines.engine.modulation import Modulation, TransformerVariant
from pipelines.engine.options import EngineOptions
from pipelines.optimize.context import Change, OptimizationContext

CACHED = 64  # prompts (4 MiB each at FLUX.1's size) and sizes (4 MiB at 1024x1024)


def cache_texts(engine: FluxEngine, _: OptimizationContext) -> Change:
    return Change(replace(engine.options, text_cache=CACHED))


def cache_rotaries(engine: FluxEngine, _: OptimizationContext) -> Change:
    return Change(replace(engine.options, rotary_cache=CACHED))


def extract_modulation(engine: FluxEngine, _: OptimizationContext) -> Change:
    """Take the modulation's layers out of the transformers, to make the vectors of all steps in one product."""
    return Change(change_variants(engine, lambda one: replace(one, modulation=Modulation(one.transformer))))


def restore_modulation(engine: FluxEngine) -> EngineOptions:
    """Put the modulation's layers back: each step makes its own vectors again."""

    def restore(variant: TransformerVariant) -> TransformerVariant:
        if variant.modulation is not None:
            variant.modulation.restore()
        return replace(variant, modulation=None)

    return change_variants(engine, restore)


def change_variants(engine: FluxEngine, change: Callable[[TransformerVariant], TransformerVariant]) -> EngineOptions:
    """The engine's options with every variant changed once, however many presets share it."""
    changed = {id(variant): change(variant) for variant in engine.distinct_variants()}
    variants = {preset: changed[id(variant)] for preset, variant in engine.variants.items()}
    return replace(engine.options, variants=variants)
