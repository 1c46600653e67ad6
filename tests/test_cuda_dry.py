"""The engine on a CUDA card that is not there, in FLUX.1's own shapes: every tensor on its device, and nobody waits.

The transformer has FLUX.1's widths and two double and three single blocks: enough for a block to get what another one
made, which a graph may be compiled anew for. `make cuda-dry` runs this file alone.
"""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import cycle
from typing import Any

import pytest
import torch
from support.compilers import Counting, torch_as_it_was
from support.engines import ask
from torch.nn.functional import scaled_dot_product_attention

from bench.memory import measure_stages
from bench.support.cards import CARDS, choose_attention
from bench.support.fake_card import CARD, FakeCard, fake_card
from bench.support.geometry import Layers, flux
from pipelines.engine.base import EngineInfo
from pipelines.engine.flux import FluxEngine
from pipelines.engine.options import EngineOptions
from pipelines.engine.sample import Sample
from pipelines.fields import Size
from pipelines.loading.build import choose_convolutions
from pipelines.loading.placement import OVERHEAD, working_bytes
from pipelines.optimize import attention
from pipelines.optimize import compile as compiling
from pipelines.optimize.apply import AppliedOptimizations, apply_optimizations
from pipelines.optimize.batching import compare_steps
from pipelines.optimize.compile import COMPILED
from pipelines.optimize.context import OptimizationContext
from pipelines.optimize.optimizations import OPTIMIZATIONS
from pipelines.request import ImageRequest, Source
from weights.latent_rgb import FLUX_LATENT_RGB

FEW = Layers(double=2, single=3, t5=1, clip=1)
SIZES = [(512, 512), (1440, 512), (544, 672), (768, 1344), (1024, 1024), (1504, 576), (1536, 1536)]
STEPS = 4  # of 28: with `high` the fourth one is skipped
# Where the host waits, all of it. diffusers copies what the tokenizers made, for each new prompt.
PROMPT = [
    "pipeline_flux._get_clip_prompt_embeds: a tensor to the card",
    "pipeline_flux._get_t5_prompt_embeds: a tensor to the card",
    "pipeline_flux.encode_prompt: a tensor to the card",
]
PREVIEW = ["preview.draw: a tensor to the host"]
PIXELS = ["flux.decode: a tensor to the host"]
PICTURE = [  # diffusers draws the VAE's noise on the CPU, and looks up where the schedule begins
    "torch_utils.randn_tensor: a tensor to the card",
    "scheduling_flow_match_euler_discrete.scale_noise: a tensor to the card",
]
# torch's own: of the others' kernels a fake one is always there
ATTENTION = ("native", "_native_cudnn", "_native_flash", "_native_efficient")


@pytest.fixture(scope="module")
def card() -> Iterator[FakeCard]:
    if shutil.which("g++") is None:
        pytest.skip("the card that is not there needs g++")
    with fake_card() as card:
        yield card


@pytest.fixture(autouse=True)
def _torch_as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(attention, "CANDIDATES", ATTENTION)
    with torch_as_it_was():
        yield


def make_engine(names: Sequence[str] = (), compiler: Any = None) -> FluxEngine:
    """The engine with the optimizations `names`."""
    info = EngineInfo("flux", str(CARD), "bfloat16", "")
    options = EngineOptions(info, text_tokens=512, preview=FLUX_LATENT_RGB)
    context = OptimizationContext(compiler or Counting())
    wanted = [name for name in OPTIMIZATIONS if name in names]
    engine, _ = apply_optimizations(
        FluxEngine(flux(torch.bfloat16, CARD, FEW).pipeline, options), wanted, context=context
    )
    return engine


def draw(engine: FluxEngine, card: FakeCard, request: ImageRequest) -> list[Sample]:
    """Some steps of a request, a look at it and its pixels; nothing waits but what must."""
    samples = engine.prepare(request)
    with card.recorded() as waits:
        for _ in range(min(STEPS, engine.steps_left(samples[0]))):
            engine.step(samples[:1])
    assert not waits
    with card.recorded() as waits:
        assert engine.preview(samples[0], 64) is not None
    assert waits == PREVIEW
    with card.recorded() as waits:
        assert len(engine.finish(samples[0]).data) == 3 * request.width * request.height
    assert waits == PIXELS
    return samples


@pytest.mark.long
def test_every_size_is_drawn_without_waiting(card: FakeCard) -> None:
    engine = make_engine()
    for width, height in SIZES:
        with card.recorded() as waits:
            engine.prepare(ask(width, height, 28, acceleration="high"))
        assert waits == PROMPT
        (sample,) = draw(engine, card, ask(width, height, 28, acceleration="high"))
        assert sample.latents.device == CARD
        assert sample.latents.dtype == torch.bfloat16
        assert sample.latents.shape == (1, width * height // 256, 64)


@pytest.mark.parametrize("name", [name for name in OPTIMIZATIONS if name not in COMPILED])
def test_every_optimization_works_on_the_card(card: FakeCard, name: str) -> None:
    """Alone; it compares itself with the plain engine, as at every start."""
    engine = make_engine([name])
    draw(engine, card, ask(1440, 512, 28, acceleration="high"))
    with card.recorded() as waits:
        engine.prepare(ask(1440, 512, 28))
    assert waits == ([] if name == "texts" else PROMPT)


def test_every_kernel_of_attention_takes_the_engines_shapes(card: FakeCard) -> None:
    engine = make_engine()
    samples = engine.prepare(ask(1440, 512, 28))
    for name in ATTENTION:
        attention.set_backend(engine, name)
        with card.recorded() as waits:
            engine.step(samples)
        assert not waits


@pytest.mark.parametrize(
    ("capability", "width", "kernel"),
    [("9.0", 128, "cudnn"), ("8.9", 128, "flash"), ("8.0", 128, "flash"), ("9.0", 512, "efficient")],
)
def test_attention_is_compiled_as_the_kernel_that_the_card_has(
    card: FakeCard, capability: str, width: int, kernel: str
) -> None:
    """`python -m bench.cuda_dry` has no driver to ask; torch would take attention apart into products."""
    called: list[str] = []

    def compiler(graph: torch.fx.GraphModule, _: Any) -> Any:
        choose_attention(graph, CARDS[capability])
        called.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    query, key, value = torch.empty(3, 1, 2, 64, width, dtype=torch.bfloat16, device=CARD)
    with card.paused():
        attended = torch.compile(scaled_dot_product_attention, backend=compiler)(query, key, value)
    assert attended.shape == query.shape
    assert f"aten._scaled_dot_product_{kernel}_attention.default" in called
    assert "scaled_dot_product_attention" not in called


def test_a_picture_to_begin_with(card: FakeCard) -> None:
    engine = make_engine()
    request = replace(ask(1440, 512, 28), source=Source(bytes(3 * 1440 * 512), 0.8))
    with card.recorded() as waits:
        engine.prepare(request)
    assert waits == [*PROMPT, *PICTURE]
    draw(engine, card, request)


@pytest.mark.long
def test_images_of_several_seeds_share_steps(card: FakeCard) -> None:
    """The comparison that decides whether they may asks for numbers; the steps themselves do not."""
    engine = make_engine(["texts", "rotary", "modulation"])
    samples = engine.prepare(ask(512, 512, 28, num_images=2, acceleration="high"))
    with card.recorded() as waits:
        for _ in range(STEPS):
            engine.step(samples)
    assert not waits
    assert compare_steps(engine, Size(512, 512), 2, "none")


@pytest.mark.parametrize(("width", "height"), [(512, 512), (1536, 1536)])
def test_no_stage_takes_more_memory_than_the_placement_counts(card: FakeCard, width: int, height: int) -> None:
    """And the greediest one not much less: a card is not refused for nothing."""
    peaks = measure_stages(make_engine(), card, width, height)
    counted = working_bytes(width * height, "bfloat16") - OVERHEAD
    assert 0.97 * counted < max(peaks.values()) <= counted


@pytest.mark.parametrize("compiled", [False, True])
def test_convolutions_are_chosen_while_memory_is_free(
    card: FakeCard, monkeypatch: pytest.MonkeyPatch, compiled: bool
) -> None:
    """Also where the decoder is compiled, and the warm-up has decoded. The encoder is used by image-to-image alone."""
    decoded, encoded = list[Size](), list[Size]()

    def decode(_: FluxEngine, sample: Sample) -> bytes:
        decoded.append(sample.size)
        return bytes(3 * sample.size.width * sample.size.height)

    def encode(pixels: torch.Tensor) -> Any:
        encoded.append(Size(pixels.shape[3], pixels.shape[2]))
        return real(pixels)

    engine = make_engine()
    real = engine.pipeline.vae.encode
    monkeypatch.setattr(FluxEngine, "decode", decode)
    monkeypatch.setattr(engine.pipeline.vae, "encode", encode)
    choose_convolutions(engine, AppliedOptimizations({"compile_vae": ""} if compiled else {}), lambda *_: None)
    assert decoded == ([] if compiled else list(compiling.SIZES))
    assert encoded == list(compiling.SIZES)


@pytest.mark.long
def test_what_is_compiled_is_compiled_in_the_warm_up_and_never_after(card: FakeCard) -> None:
    """Three graphs a precision at most (the last block's inputs lie otherwise in memory), and one of the decoder."""
    counting = Counting()
    engine = make_engine(list(OPTIMIZATIONS), counting)
    precisions = len(engine.distinct_variants())
    assert precisions == 2
    warm = len(counting.graphs)
    assert 0 < warm <= 3 * precisions + 1
    sizes = [(width, height) for width in range(512, 1537, 256) for height in range(512, 1537, 352)]
    assert len(sizes) == 15  # `python -m bench.cuda_dry` tries forty, with code generated
    for (width, height), preset in zip(sizes, cycle(["none", "high"]), strict=False):
        (sample,) = engine.prepare(ask(width, height, 28, acceleration=preset))
        with card.recorded() as waits:
            engine.step([sample])
        assert not waits
    for width, height in SIZES[1:3]:
        draw(engine, card, ask(width, height, 28, acceleration="high"))
    assert len(counting.graphs) == warm
