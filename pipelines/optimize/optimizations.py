"""The fast path, one lever a row: what it does, whether it is exact, where it is pulled by default. No torch here.

With every lever off the engine is `FluxPipeline` bit for bit. Levers are pulled once, before anything is drawn, in the
table's order (`pulling.py`); each can be pulled alone. What moves bits is part of the engine's fingerprint, and can be
undone: not every machine can do it.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipelines.engine.flux import FluxEngine

REMEMBERED = 64  # prompts (4 MiB each at FLUX.1's size) and sizes (4 MiB at 1024x1024)
ROUNDINGS = 16
FLOAT8 = 0.25
ACCURACIES: Mapping[str, str] = {
    "exact": "exact: the same bits",
    "rounding": f"rounding: a step's velocity differs by at most {ROUNDINGS} roundings of its largest value",
    "float8": f"float8: a step's velocity differs by at most {FLOAT8:.0%} of its largest value; `none` stays exact",
}


@dataclass(frozen=True, slots=True)
class Optimization:
    """One row: `apply` changes an engine and returns the choice that it made, or "". `revert` undoes it, for those that
    are not exact. `devices`: where it is on by default."""

    says: str
    accuracy: str  # a key of ACCURACIES
    devices: tuple[str, ...]
    apply: Callable[["FluxEngine"], str]
    revert: Callable[["FluxEngine"], None] | None = None


def remember_texts(engine: "FluxEngine") -> str:
    engine.texts.limit = REMEMBERED
    return ""


def remember_rotaries(engine: "FluxEngine") -> str:
    engine.rotaries.limit = REMEMBERED
    return ""


def take_float8(engine: "FluxEngine") -> str:
    from pipelines.optimize.fp8 import add_float8_variant

    return add_float8_variant(engine)


def leave_float8(engine: "FluxEngine") -> None:
    engine.variants = dict.fromkeys(engine.variants, engine.variants["none"])


def modulate_at_once(engine: "FluxEngine") -> str:
    from pipelines.engine.modulation import Modulation

    for variant in engine.distinct_variants():
        variant.modulation = Modulation(variant.transformer)
    return ""


def modulate_by_step(engine: "FluxEngine") -> None:
    for variant in engine.distinct_variants():
        if variant.modulation is not None:
            variant.modulation.give_back()
            variant.modulation = None


def choose_attention(engine: "FluxEngine") -> str:
    from pipelines.optimize.attention import fastest

    name = engine.remember("attention", lambda: fastest(engine.pipeline.transformer))
    attend(engine, name)
    return name


def attend(engine: "FluxEngine", name: str = "native") -> None:
    for variant in engine.distinct_variants():
        variant.transformer.set_attention_backend(name)


def lay_out_vae(engine: "FluxEngine") -> str:
    import torch

    engine.pipeline.vae.to(memory_format=torch.channels_last)
    return ""


def lay_out_vae_plainly(engine: "FluxEngine") -> None:
    import torch

    engine.pipeline.vae.to(memory_format=torch.contiguous_format)


def compile_blocks(engine: "FluxEngine") -> str:
    from pipelines.optimize.compile import compile_transformers

    return compile_transformers(engine)


def run_blocks(engine: "FluxEngine") -> None:
    from pipelines.optimize.compile import leave_transformers

    leave_transformers(engine)


def compile_vae(engine: "FluxEngine") -> str:
    from pipelines.optimize.compile import compile_decoder

    return compile_decoder(engine)


def run_vae(engine: "FluxEngine") -> None:
    from pipelines.optimize.compile import leave_decoder

    leave_decoder(engine)


OPTIMIZATIONS: Mapping[str, Optimization] = {
    "texts": Optimization("the last 64 prompts' embeddings are remembered", "exact", ("cpu", "cuda"), remember_texts),
    "rotary": Optimization("position tables are kept for each size", "exact", ("cpu", "cuda"), remember_rotaries),
    "fp8": Optimization(
        "regular and high multiply in float8, scaled by row, in the blocks' linear layers (needs the extra `fp8`)",
        "float8",
        (),
        take_float8,
        leave_float8,
    ),
    "modulation": Optimization(
        "the modulation of all steps is one product", "rounding", ("cuda",), modulate_at_once, modulate_by_step
    ),
    "attention": Optimization(
        "the attention kernel that was the fastest here when first measured",
        "rounding",
        ("cuda",),
        choose_attention,
        attend,
    ),
    "vae_layout": Optimization(
        "the VAE's convolutions in channels-last order", "rounding", ("cuda",), lay_out_vae, lay_out_vae_plainly
    ),
    "compile": Optimization(
        "the transformer's blocks are compiled, once for all sizes", "rounding", ("cuda",), compile_blocks, run_blocks
    ),
    "compile_vae": Optimization(
        "the VAE's decoder is compiled, once for all sizes", "rounding", ("cuda",), compile_vae, run_vae
    ),
}


def chosen(names: Iterable[str], device: str) -> list[str]:
    """The levers that `names` (`default`, `none` or rows of the table) ask for on a kind of device, in table order."""
    asked = set(names)
    if "default" in asked:
        asked |= {name for name, optimization in OPTIMIZATIONS.items() if device in optimization.devices}
    return [name for name in OPTIMIZATIONS if name in asked]


def validate_names(names: tuple[str, ...]) -> tuple[str, ...]:
    """The names, unchanged. Raises `ValueError` for an unknown one, and for `none` beside others."""
    for name in names:
        if name not in (*OPTIMIZATIONS, "default", "none"):
            raise ValueError(
                f"{name!r} is no optimization: expected default, none, or some of {', '.join(OPTIMIZATIONS)}"
            )
    if "none" in names and len(names) > 1:
        raise ValueError("none and other optimizations exclude each other")
    return names


def moving_bits(applied: Mapping[str, str]) -> dict[str, str]:
    """Those of the pulled levers that are not exact: the fingerprint must tell them apart."""
    return {name: choice for name, choice in applied.items() if OPTIMIZATIONS[name].accuracy != "exact"}


def described(applied: Mapping[str, str], failed: Mapping[str, str]) -> str:
    """For people: `texts, rotary, attention (_native_cudnn); without compile, which fails here: ...`."""
    have = ", ".join(f"{name} ({choice})" if choice else name for name, choice in applied.items()) or "none"
    return "; ".join([have, *(f"without {name}, which fails here: {reason}" for name, reason in failed.items())])
