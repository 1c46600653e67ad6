"""The step engine against diffusers' own pipeline: bit for bit, on the tiny model."""

import json
from dataclasses import replace
from importlib import metadata
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxImg2ImgPipeline
from PIL import Image
from support.engines import DTYPES, ask, draw, tiny_engine

from pipelines.acceleration import PRESETS
from pipelines.engine.failures import classify_failure
from pipelines.engine.flux import FluxEngine
from pipelines.errors import NonFinitePixels
from pipelines.fields import Size
from pipelines.loading.build import describe_engine
from pipelines.loading.fingerprint import compute_fingerprint, digest_module
from pipelines.request import ImageRequest, Source
from weights import tiny

SIZES = [(512, 512), (1440, 512), (544, 672), (512, 768), (896, 512)]
# Sizes are few steps' matter; many steps are tried at one size each.
DRAWN = [*((*size, 4) for size in SIZES), (512, 512, 1), (544, 672, 28), (512, 768, 50)]
EDITED = [
    (512, 512, 4, 0.6),
    (1440, 512, 10, 0.95),
    (544, 672, 1, 1.0),
    (512, 768, 10, 0.31),
    (896, 512, 4, 0.6),
]


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def engine(request: pytest.FixtureRequest) -> FluxEngine:
    return tiny_engine(request.param)


@pytest.mark.filterwarnings("ignore:.*progress")
@pytest.mark.parametrize(("width", "height", "steps"), DRAWN)
def test_equals_flux_pipeline_bit_for_bit(engine: FluxEngine, width: int, height: int, steps: int) -> None:
    rng = np.random.default_rng(width * steps)
    request = ask(
        width,
        height,
        steps,
        prompt="".join(chr(code) for code in rng.integers(32, 0x2FF, size=40)),
        guidance_scale=float(rng.uniform(1, 20)),
        seed=int(rng.integers(1, 2**31)),
    )
    pipeline = engine.pipeline
    pipeline.set_progress_bar_config(disable=True)
    reference = pipeline(
        request.prompt,
        width=width,
        height=height,
        num_inference_steps=steps,
        guidance_scale=request.guidance_scale,
        generator=torch.Generator("cpu").manual_seed(request.seeds[0]),
        max_sequence_length=tiny.TEXT_TOKENS,
    ).images[0]
    assert draw(engine, request) == [reference.tobytes()]


def test_image_i_of_seed_s_is_the_single_image_of_s_plus_i(engine: FluxEngine) -> None:
    together = draw(engine, ask(seed=41, num_images=4))
    alone = [draw(engine, ask(seed=41 + index))[0] for index in range(4)]
    assert together == alone
    assert len(set(together)) == 4


def test_interleaved_samples_do_not_know_of_each_other(engine: FluxEngine) -> None:
    requests = [
        ask(512, 512, 3, seed=5),
        ask(544, 672, 5, seed=6, guidance_scale=2),
        ask(1440, 512, 2, prompt="a green leaf"),
    ]
    alone = [draw(engine, request)[0] for request in requests]
    samples = [engine.prepare(request)[0] for request in requests]
    while pending := [sample for sample in samples if engine.steps_left(sample)]:
        for sample in reversed(pending):
            engine.step([sample])
    assert [engine.finish(sample).data for sample in samples] == alone


def test_samples_of_different_kinds_share_no_step(engine: FluxEngine) -> None:
    samples = [engine.prepare(ask(width))[0] for width in (512, 544)]
    with pytest.raises(ValueError, match="different kinds"):
        engine.step(samples)
    assert [engine.steps_left(sample) for sample in samples] == [2, 2]


@pytest.mark.parametrize("change", [{"seed": 8}, {"prompt": "a blue heart"}, {"guidance_scale": 9.0}])
def test_seed_prompt_and_guidance_each_change_the_picture(engine: FluxEngine, change: dict[str, Any]) -> None:
    assert draw(engine, ask(seed=7)) != draw(engine, ask(**({"seed": 7} | change)))


def test_seeds_equal_modulo_2_to_the_32_draw_the_same(engine: FluxEngine) -> None:
    assert draw(engine, ask(seed=3)) == draw(engine, ask(seed=3 + 2**32))


def test_non_finite_pixels_are_an_error_not_a_picture(engine: FluxEngine) -> None:
    sample = engine.prepare(ask(steps=1))[0]
    engine.step([sample])
    sample.latents = torch.full_like(sample.latents, float("nan"))
    with pytest.raises(NonFinitePixels):
        engine.finish(sample)


def test_a_prompt_beyond_the_models_reach_is_said(engine: FluxEngine) -> None:
    sample = engine.prepare(ask(steps=1, prompt="x" * 100))[0]
    assert sample.text.notes == ("prompt: the model read the first 64 of 101 tokens",)
    assert engine.prepare(ask(steps=1))[0].text.notes == ()


def test_the_fingerprint_moves_with_a_weight_and_with_the_precision() -> None:
    def of_tiny(dtype: torch.dtype, flip: bool = False) -> str:
        pipeline = tiny.build(dtype)
        if flip:
            pipeline.vae.decoder.conv_out.weight.view(-1)[3] += 0.5
        return describe_engine("tiny", pipeline, torch.device("cpu"), dtype).fingerprint

    same = of_tiny(torch.float32)
    assert same == of_tiny(torch.float32)
    assert len({same, of_tiny(torch.bfloat16), of_tiny(torch.float32, flip=True)}) == 3


@pytest.mark.parametrize("library", ["triton", "torchao", "nvidia-cublas", "nvidia-cublas-cu12"])
def test_the_fingerprint_moves_with_every_library_of_kernels(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before, own = compute_fingerprint("cpu", "float32", {}), metadata.version
    monkeypatch.setattr("pipelines.loading.fingerprint.version", lambda name: "99.1" if name == library else own(name))
    assert compute_fingerprint("cpu", "float32", {}) != before


@pytest.mark.parametrize("variable", ["CUBLAS_WORKSPACE_CONFIG", "NVIDIA_TF32_OVERRIDE", "MKL_CBWR"])
def test_the_fingerprint_moves_with_a_variable_that_chooses_kernels(
    variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(variable, raising=False)
    before = compute_fingerprint("cpu", "float32", {})
    monkeypatch.setenv(variable, "1")
    assert compute_fingerprint("cpu", "float32", {}) != before


def test_the_fingerprint_moves_with_cudnn_and_on_a_card_with_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    card, found = torch.device("cuda"), set[str]()
    for cudnn, driver in ((92000, "580.65"), (92100, "580.65"), (92100, "590.10")):
        monkeypatch.setattr(torch.backends.cudnn, "version", lambda cudnn=cudnn: cudnn)
        monkeypatch.setattr("pipelines.loading.fingerprint.read_driver_version", lambda driver=driver: driver)
        found.add(compute_fingerprint("an H100", "bfloat16", {}, card))
    assert len(found) == 3
    on_cpu = compute_fingerprint("cpu", "float32", {})
    monkeypatch.setattr("pipelines.loading.fingerprint.read_driver_version", lambda: "another")
    assert compute_fingerprint("cpu", "float32", {}) == on_cpu


def test_a_tree_that_is_not_installed_has_a_fingerprint_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container or on a borrowed machine, where the code is copied: with the tree's own version."""
    installed, own = compute_fingerprint("cpu", "float32", {}), metadata.version

    def version(name: str) -> str:
        if name == "srpo-server":
            raise metadata.PackageNotFoundError(name)
        return own(name)

    for module in ("weights.version", "pipelines.loading.fingerprint"):
        monkeypatch.setattr(f"{module}.version", version)
    assert compute_fingerprint("cpu", "float32", {}) == installed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_flipped_bit_anywhere_in_a_large_tensor_is_another_digest(dtype: torch.dtype) -> None:
    layer = torch.nn.Linear(1501, 1501, dtype=dtype)  # larger than what is digested whole, and no whole words
    before = digest_module(layer)
    rng = np.random.default_rng(4)
    bits = layer.weight.detach().view(-1).view(torch.int16 if dtype == torch.bfloat16 else torch.int32)
    for place in (*rng.integers(0, bits.numel(), size=5), bits.numel() - 1):
        bits[place] ^= 1 << int(rng.integers(0, 15))
        assert digest_module(layer) != before
        before = digest_module(layer)


def test_the_fingerprint_moves_with_the_steps_a_preset_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    before = compute_fingerprint("cpu", "float32", {})
    monkeypatch.setitem(PRESETS, "high", PRESETS["regular"])
    assert compute_fingerprint("cpu", "float32", {}) != before


PINNED = "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call"
CUBLAS = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
NO_PLAN = "GET was unable to find an engine to execute this computation"
ILLEGAL = "an illegal memory access was encountered"


@pytest.mark.parametrize(
    ("error", "name"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB."), "OutOfMemory"),
        (torch.AcceleratorError(PINNED), "OutOfMemory"),
        (RuntimeError(CUBLAS), "OutOfMemory"),
        (RuntimeError(NO_PLAN), "OutOfMemory"),
        (RuntimeError("Triton Error [CUDA]: out of memory"), "OutOfMemory"),
        (RuntimeError("shape mismatch"), "GenerationFailed"),
        (torch.AcceleratorError(f"CUDA error: {ILLEGAL}"), None),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"), None),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), None),
        (RuntimeError(f"Triton Error [CUDA]: {ILLEGAL}"), None),
    ],
)
def test_out_of_memory_is_the_requests_and_a_cuda_error_is_the_devices(
    engine: FluxEngine, error: Exception, name: str | None
) -> None:
    assert engine.failure(error) == name


@pytest.mark.parametrize("error", [RuntimeError("shape mismatch"), RuntimeError(NO_PLAN)])
def test_after_an_error_that_does_not_say_it_the_device_is_asked(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    cuda = torch.device("cuda")
    assert classify_failure(error, cuda) is not None
    assert waited == [cuda]

    def fail(_: torch.device) -> None:
        raise torch.AcceleratorError(f"CUDA error: {ILLEGAL}")

    monkeypatch.setattr(torch.cuda, "synchronize", fail)
    assert classify_failure(error, cuda) is None


@pytest.mark.parametrize("words", [PINNED, CUBLAS, NO_PLAN])
def test_a_batch_that_is_out_of_memory_in_other_words_is_not_tried_again(
    engine: FluxEngine, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine.change(batches={Size(512, 512): (2,)})
    samples = [engine.prepare(ask(512, 512, seed=seed))[0] for seed in (1, 2)]
    assert len(engine.select_batch(samples)) == 2

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError(words)

    monkeypatch.setattr(samples[0].variant.transformer, "forward", fail)
    with pytest.raises(RuntimeError):
        engine.step(samples)
    assert len(engine.select_batch(samples)) == 1


def over(request: ImageRequest, strength: float, rng: np.random.Generator) -> ImageRequest:
    pixels = rng.integers(0, 256, request.pixels * 3, dtype=np.uint8).tobytes()
    return replace(request, source=Source(pixels, strength))


@pytest.mark.parametrize(("width", "height", "steps", "strength"), EDITED)
def test_image_to_image_equals_diffusers_own_pipeline_bit_for_bit(
    engine: FluxEngine, width: int, height: int, steps: int, strength: float
) -> None:
    rng = np.random.default_rng(width * steps)
    guidance, seed = float(rng.uniform(1, 20)), int(rng.integers(1, 2**31))
    request = over(ask(width, height, steps, guidance_scale=guidance, seed=seed), strength, rng)
    assert request.source is not None
    pipeline = FluxImg2ImgPipeline(**engine.pipeline.components)
    pipeline.set_progress_bar_config(disable=True)
    reference = pipeline(
        request.prompt,
        image=Image.frombytes("RGB", (width, height), request.source.pixels),
        width=width,
        height=height,
        strength=strength,
        num_inference_steps=steps,
        guidance_scale=guidance,
        max_sequence_length=tiny.TEXT_TOKENS,
        generator=torch.Generator().manual_seed(seed),
    ).images[0]
    assert draw(engine, request) == [reference.tobytes()]


@pytest.mark.parametrize(
    ("steps", "strength", "carried_out"), [(40, 0.95, 38), (28, 1.0, 28), (4, 0.0, 1), (50, 0.01, 1)]
)
def test_strength_is_the_share_of_the_steps_that_are_carried_out(steps: int, strength: float, carried_out: int) -> None:
    request = over(ask(steps=steps), strength, np.random.default_rng(1))
    assert request.steps == carried_out
    assert request.cost == pytest.approx(ask(steps=carried_out).cost)


def test_a_request_with_a_source_survives_the_pipe() -> None:
    request = over(ask(), 0.4, np.random.default_rng(2))
    assert request.source is not None
    assert ImageRequest.from_json(json.loads(json.dumps(request.to_json())), request.source.pixels) == request
