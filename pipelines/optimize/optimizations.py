"""What makes the engine fast, one row each: what it does, whether it is exact, and where it is on by default.

Imports no torch: a row names its functions as `module:function`, and `apply.py` imports them. With every optimization
off the engine equals `FluxPipeline` bit for bit. Optimizations are applied once, before anything is drawn, in the
table's order; each also works alone. One that can change bits is part of the engine's fingerprint and can be reverted,
because not every machine supports it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

ROUNDINGS = 16
FLOAT8 = 0.25
ACCURACIES: Mapping[str, str] = {
    "exact": "exact: the same bits",
    "rounding": f"rounding: a step's velocity differs by at most {ROUNDINGS} roundings of its largest value",
    "float8": f"float8: a step's velocity differs by at most {FLOAT8:.0%} of its largest value; `none` stays exact",
}


@dataclass(frozen=True, slots=True)
class Optimization:
    """One row.

    `description` and `accuracy` (a key of `ACCURACIES`) are for people; `devices` are the kinds of device where it is
    on by default. `apply` takes an engine and an `OptimizationContext` and returns a `Change`. `revert` takes the
    engine and returns the options without the optimization; one that is exact needs none.
    """

    description: str
    accuracy: str
    devices: tuple[str, ...]
    apply: str
    revert: str | None = None


HERE = "pipelines.optimize"
OPTIMIZATIONS: Mapping[str, Optimization] = {
    "texts": Optimization(
        "the last 64 prompts' embeddings are remembered", "exact", ("cpu", "cuda"), f"{HERE}.precompute:cache_texts"
    ),
    "rotary": Optimization(
        "position tables are kept for each size", "exact", ("cpu", "cuda"), f"{HERE}.precompute:cache_rotaries"
    ),
    "qkv": Optimization(
        "query, key and value of each attention are one product, in single blocks with the MLP's",
        "rounding",
        (),
        f"{HERE}.projections:fuse_projections",
        f"{HERE}.projections:separate_projections",
    ),
    "fp8": Optimization(
        "regular and high multiply in float8, scaled by row, in the blocks' linear layers (needs the extra `fp8`)",
        "float8",
        (),
        f"{HERE}.fp8:add_float8_variant",
        f"{HERE}.fp8:remove_float8_variant",
    ),
    "modulation": Optimization(
        "the modulation of all steps is one product",
        "rounding",
        ("cuda",),
        f"{HERE}.precompute:extract_modulation",
        f"{HERE}.precompute:restore_modulation",
    ),
    "attention": Optimization(
        "the attention kernel that was the fastest here when first measured",
        "rounding",
        ("cuda",),
        f"{HERE}.attention:use_fastest_backend",
        f"{HERE}.attention:use_native_backend",
    ),
    "vae_layout": Optimization(
        "the VAE's convolutions in channels-last order",
        "rounding",
        ("cuda",),
        f"{HERE}.vae_layout:use_channels_last",
        f"{HERE}.vae_layout:use_contiguous",
    ),
    "compile": Optimization(
        "the transformer's blocks are compiled, once for all sizes",
        "rounding",
        ("cuda",),
        f"{HERE}.compile:compile_transformers",
        f"{HERE}.compile:uncompile_transformers",
    ),
    "compile_vae": Optimization(
        "the VAE's decoder is compiled, once for all sizes",
        "rounding",
        ("cuda",),
        f"{HERE}.compile:compile_decoder",
        f"{HERE}.compile:uncompile_decoder",
    ),
}


def select_optimizations(names: Iterable[str], device: str) -> list[str]:
    """The optimizations that `names` (`default`, `none` or rows) ask for on a kind of device, in the table's order."""
    selected = set(names)
    if "default" in selected:
        selected |= {name for name, optimization in OPTIMIZATIONS.items() if device in optimization.devices}
    return [name for name in OPTIMIZATIONS if name in selected]


def validate_names(names: tuple[str, ...]) -> tuple[str, ...]:
    """The names, unchanged. Raises `ValueError` for an unknown one, and for `none` beside others."""
    for name in names:
        if name not in (*OPTIMIZATIONS, "default", "none"):
            expected = f"default, none, or some of {', '.join(OPTIMIZATIONS)}"
            raise ValueError(f"{name!r} is no optimization: expected {expected}")
    if "none" in names and len(names) > 1:
        raise ValueError("none and other optimizations exclude each other")
    return names


def select_inexact(names: Iterable[str]) -> list[str]:
    """Those of the optimizations that are not exact: part of the fingerprint where they are applied."""
    return [name for name in names if OPTIMIZATIONS[name].accuracy != "exact"]


def describe_optimizations(choices: Mapping[str, str], failed: Mapping[str, str]) -> str:
    """For people: `texts, rotary, attention (_native_cudnn); without compile, which fails here: ...`."""
    applied = ", ".join(f"{name} ({choice})" if choice else name for name, choice in choices.items()) or "none"
    return "; ".join([applied, *(f"without {name}, which fails here: {reason}" for name, reason in failed.items())])
