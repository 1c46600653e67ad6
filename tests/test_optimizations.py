"""Every optimization against the slow path: the same bits, or within its bound; and nothing waits or compiles."""

import errno
import importlib.util
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from support.compilers import Counting, torch_as_it_was
from support.engines import DTYPES, ask, draw, tiny_engine
from support.server import LiveServer

from pipelines.acceleration import PRESETS
from pipelines.engine.base import EngineConfig, StartAgain
from pipelines.engine.flux import FluxEngine
from pipelines.fields import Size
from pipelines.loading.build import allow_exact_batches, optimize_engine
from pipelines.loading.fingerprint import compute_fingerprint
from pipelines.optimize import compile as compiling
from pipelines.optimize.apply import (
    OptimizationFailed,
    apply_optimizations,
    revert_optimization,
    summarize_error,
)
from pipelines.optimize.attention import PACKAGES, find_fastest
from pipelines.optimize.compile import COMPILED
from pipelines.optimize.context import OptimizationContext
from pipelines.optimize.optimizations import (
    ACCURACIES,
    FLOAT8,
    OPTIMIZATIONS,
    ROUNDINGS,
    select_optimizations,
    validate_names,
)
from pipelines.optimize.projections import join_layers, split_layer
from pipelines.optimize.tuning_cache import FAILED_OPTIMIZATIONS, TuningCache
from server.__main__ import main as srpo
from server.cli.selfcheck import forget_results
from server.cli.terminal.parsing import parse
from server.engine_setup import build_engine_config
from server.settings.server import Settings
from weights.formats.fp8_linear import Float8Linear

EXACT = [name for name, optimization in OPTIMIZATIONS.items() if optimization.accuracy == "exact"]
ROUNDED = [name for name, optimization in OPTIMIZATIONS.items() if optimization.accuracy == "rounding"]


class Refusing:
    """A compiler that does not know the device."""

    def __call__(
        self, graph: torch.fx.GraphModule, _: list[torch.Tensor], options: Mapping[str, object]
    ) -> Callable[..., object]:
        raise RuntimeError("no kernel image")


class Wrong(Counting):
    """A compiler that gets it wrong."""

    def __call__(
        self, graph: torch.fx.GraphModule, _: list[torch.Tensor], options: Mapping[str, object]
    ) -> Callable[..., object]:
        return lambda *args: [torch.randn_like(value) * value.abs().max() for value in graph(*args)]


WARM_UP_SIZES = compiling.SIZES


@pytest.fixture(autouse=True)
def _torch_as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Warm-ups are short."""
    monkeypatch.setattr(compiling, "SIZES", (Size(512, 512),))
    with torch_as_it_was():
        yield


def fast_engine(dtype: torch.dtype, *names: str) -> FluxEngine:
    selected = [name for name in OPTIMIZATIONS if name in names]
    engine, _ = apply_optimizations(tiny_engine(dtype), selected, context=OptimizationContext(Counting()))
    return engine


def velocity(engine: FluxEngine, preset: str, steps: int = 1) -> torch.Tensor:
    sample = engine.prepare(ask(544, 672, 28, seed=11, guidance_scale=3.7, acceleration=preset))[0]
    for _ in range(steps):
        engine.step([sample])
    assert sample.velocity is not None
    return sample.velocity.float()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", EXACT)
def test_an_exact_optimization_changes_no_bit(name: str, dtype: torch.dtype) -> None:
    slow, fast = tiny_engine(dtype), fast_engine(dtype, name)
    for request in (
        ask(512, 512, 10, seed=5, num_images=2, acceleration="high"),
        ask(544, 672, 3, seed=6),
        ask(512, 512, 2, prompt="another", seed=7),
        ask(512, 512, 2, seed=8),  # what is remembered by now
    ):
        assert draw(fast, request) == draw(slow, request)


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, dtype) for name in ROUNDED for dtype in DTYPES if name not in COMPILED or dtype == torch.bfloat16],
)
def test_a_rounding_optimization_stays_within_its_bound(name: str, dtype: torch.dtype) -> None:
    """And can be undone: then no bit differs."""
    slow, fast = tiny_engine(dtype), fast_engine(dtype, name)
    for preset in ("none", "high"):
        reference = velocity(slow, preset)
        error = (velocity(fast, preset) - reference).abs().max()
        assert error <= ROUNDINGS * torch.finfo(dtype).eps * reference.abs().max()
    request = ask(512, 512, 2, seed=3)
    exact = draw(slow, request)[0]
    pictures = [torch.frombuffer(bytearray(data), dtype=torch.uint8).int() for data in (exact, draw(fast, request)[0])]
    assert (pictures[0] - pictures[1]).abs().max() <= 255 * ROUNDINGS * torch.finfo(dtype).eps + 1
    assert draw(revert_optimization(fast, name), request)[0] == exact


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_modulations_vectors_are_the_models_own_but_for_the_rounding_of_one_product(dtype: torch.dtype) -> None:
    """Made step by step they are exact: what differs with all at once is the product of many rows alone."""
    slow, fast = tiny_engine(dtype), fast_engine(dtype, "modulation")
    variant = fast.variants["high"]
    assert variant.modulation is not None
    whole = variant.modulation.table
    rows = lambda times, *rest: torch.cat([whole(times[i : i + 1], *rest) for i in range(len(times))])  # noqa: E731
    variant.modulation.table = rows  # type: ignore[method-assign]
    request = ask(512, 512, 10, seed=5, num_images=2, acceleration="high")
    assert draw(fast, request) == draw(slow, request)


def test_float8_draws_regular_and_high_alone_and_within_its_bound() -> None:
    pytest.importorskip("torchao", reason="the extra fp8 is not installed")
    slow, fast = tiny_engine(torch.bfloat16), fast_engine(torch.bfloat16, "fp8")
    exact = ask(512, 512, 3, seed=9)
    assert draw(fast, exact) == draw(slow, exact)
    for preset in ("regular", "high"):
        reference = velocity(slow, preset)
        error = (velocity(fast, preset) - reference).abs().max() / reference.abs().max()
        assert 0 < error <= FLOAT8
    quantized, plain = fast.variants["high"].transformer, fast.variants["none"].transformer
    shared = {name for name, tensor in plain.named_parameters() if tensor is quantized.get_parameter(name)}
    assert all(
        "norm" in name or "embed" in name or name.startswith("proj_out") or name.endswith("bias") for name in shared
    )
    assert {"x_embedder.weight", "transformer_blocks.0.norm1.linear.weight", "proj_out.weight"} <= shared


def test_joined_projections_take_no_memory_and_are_quantized_as_one() -> None:
    pytest.importorskip("torchao", reason="the extra fp8 is not installed")
    slow, fast = tiny_engine(torch.bfloat16), fast_engine(torch.bfloat16, "qkv", "fp8")
    count = lambda transformer: sum(tensor.numel() for tensor in transformer.parameters())  # noqa: E731
    for preset in ("none", "high"):
        transformer = fast.variants[preset].transformer
        assert count(transformer) == count(slow.variants[preset].transformer)
        for joined in (transformer.transformer_blocks[0].attn.to_qkv, transformer.single_transformer_blocks[0].proj_in):
            assert type(joined.weight).__name__ == {"none": "Parameter", "high": "Float8Tensor"}[preset]
        error = (velocity(fast, preset) - velocity(slow, preset)).abs().max()
        assert error <= FLOAT8 * velocity(slow, preset).abs().max()


def test_projections_stored_in_float8_are_joined_with_their_scales() -> None:
    layers = [Float8Linear(32, 16, bias=True) for _ in range(3)]
    for layer in layers:
        values = {"weight_scale": torch.rand(16, 1), "bias": torch.randn(16)}
        layer.load_state_dict(values | {"weight": torch.randn(16, 32).to(layer.weight.dtype)})
    inputs = torch.randn(5, 32)
    joined = join_layers(layers)
    torch.testing.assert_close(joined(inputs), torch.cat([layer(inputs) for layer in layers], dim=-1))
    for layer, part in zip(layers, split_layer(joined, [16] * 3), strict=True):
        assert torch.equal(part(inputs), layer(inputs))


def test_torchao_can_be_compiled_while_warnings_are_errors() -> None:
    """A fresh installation has no bytecode yet: from Python 3.12 on torchao 0.18 then warns of its own syntax."""
    package = importlib.util.find_spec("torchao")
    if package is None or package.origin is None:
        pytest.skip("the extra fp8 is not installed")
    source = Path(package.origin).parent / "quantization" / "quant_api.py"
    compile(source.read_text(), str(source), "exec")
    warnings.warn_explicit("invalid escape sequence '\\.'", SyntaxWarning, str(source), 1542)
    with pytest.raises(SyntaxWarning):
        warnings.warn_explicit("invalid escape sequence '\\.'", SyntaxWarning, "pipelines/optimize/fp8.py", 1)


def test_float8_says_what_it_needs() -> None:
    with pytest.raises(OptimizationFailed, match=r"needs bfloat16: SRPO_DTYPE=bfloat16.*SRPO_OPTIMIZATIONS=texts"):
        fast_engine(torch.float32, "texts", "fp8")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_samples_in_one_pass_get_the_rows_of_their_own_steps(dtype: torch.dtype) -> None:
    """Unlike samples at unlike steps share a pass; only the rounding of wider products may differ."""
    fast = fast_engine(dtype, "texts", "rotary", "modulation")
    requests = [ask(512, 512, 20, seed=1), ask(512, 512, 12, seed=2, guidance_scale=9, prompt="x")]
    alone, together = ([fast.prepare(request)[0] for request in requests] for _ in range(2))
    for samples in (alone, together):
        fast.step([samples[0]])  # one step ahead
    for sample in alone:
        fast.step([sample])
    with torch.inference_mode():
        fast.step(together)
    for one, other in zip(alone, together, strict=True):
        assert one.velocity is not None
        torch.testing.assert_close(
            one.velocity, other.velocity, rtol=0, atol=float(16 * torch.finfo(dtype).eps * one.velocity.abs().max())
        )


def remember_batches(section: str, measure: Callable[[], str]) -> str:
    """Batches that were found exact at an earlier start."""
    return "[2, 4]" if section == "eager batches 512x512" else measure()


@pytest.mark.long
def test_graphs_are_made_in_the_warm_up_and_never_after(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two precisions, batches of 1, 2 and 4, forty sizes, every preset: no graph more, and nothing falls back."""
    pytest.importorskip("torchao", reason="the extra fp8 is not installed")
    monkeypatch.setattr(compiling, "SIZES", (Size(512, 512), Size(544, 672)))
    counting, said = Counting(), list[tuple[str, float]]()
    engine, _ = apply_optimizations(
        tiny_engine(torch.bfloat16),
        list(OPTIMIZATIONS),
        context=OptimizationContext(
            counting, remember_batches, (Size(512, 512),), lambda stage, done: said.append((stage, done))
        ),
    )
    warm = len(counting.graphs)
    assert 0 < warm <= 2 * 2 * 2 + 1  # block classes x precisions x one row or more, and the decoder
    assert said[0][0] == "warming up compile: 0 of 8"
    assert said == sorted(said, key=lambda one: (one[0].split(":")[0], one[1]))
    compiling.forbid_compilation()
    torch._dynamo.utils.counters.clear()
    for number in range(40):
        size = (512 + 32 * (number % 33), 512 + 32 * (number * 5 % 9)) if number else (1536, 1536)
        samples = [
            engine.prepare(ask(*size, 28, acceleration=list(PRESETS)[number % 3]))[0]
            for _ in range((1, 2, 4)[number // 3 % 3])
        ]
        with torch.inference_mode():
            engine.step(samples)
            if number % 13 == 0:
                engine.decode(samples[0])
    assert len(counting.graphs) == warm
    assert not torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_trying_batches_before_compiling_is_reported() -> None:
    """A worker that reports nothing while it loads is taken for stuck."""
    said: list[tuple[str, float]] = []
    context = OptimizationContext(report=lambda stage, done: said.append((stage, done)))
    compiling.recall_exact_batches(tiny_engine(torch.bfloat16), Size(64, 64), context)
    assert said[0] == ("trying batches: 2 of 64x64, none", 0.95)  # before the warm-up's progress


@pytest.mark.long
def test_only_batches_that_are_exact_uncompiled_are_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU it is often none, and each precision would compile a graph for nothing."""
    size, tried, compiled = Size(512, 512), list[str](), list[int]()
    cache, config = (
        TuningCache(tmp_path / "engine.json"),
        EngineConfig(optimizations=("compile",), batch_sizes=("512x512",)),
    )

    def find(engine: FluxEngine, _: Size, candidates: Sequence[int] = (2, 4), report: object = None) -> list[int]:
        block = engine.pipeline.transformer.transformer_blocks[0]
        tried.append("eager" if block._compiled_call_impl is None else f"compiled {candidates}")
        return list(candidates[:1])

    def start() -> FluxEngine:
        compiled.clear()
        engine, _ = optimize_engine(tiny_engine(torch.float32), "cpu", config, cache, lambda *_: None, Counting())
        return allow_exact_batches(engine, config, cache, lambda *_: None)

    monkeypatch.setattr(compiling, "find_exact_batches", find)
    monkeypatch.setattr("pipelines.loading.build.find_exact_batches", find)
    monkeypatch.setattr(compiling, "run_once", lambda _, __, count: compiled.append(count))
    for _ in ("the first start", "the next"):
        engine = start()
        assert engine.options.batches == {size: (2,)}
        assert set(compiled) == {1, 2}
        assert tried == ["eager", "compiled (2,)"]
    assert revert_optimization(engine, "compile").options.batches == {}
    cache.forget("eager batches 512x512")
    monkeypatch.setattr(compiling, "find_exact_batches", lambda *_, **__: [4])
    assert start().options.batches == {size: ()}  # what passed compiled at an earlier start is not compiled now


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # torch's own
def test_code_is_generated_without_timing_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Inductor itself reads when it generates a graph's code. A flag of the process is lost by then.

    It reorders no loops to fuse more: on CUDA that cannot be done for float8 in the single blocks (torch 2.13).
    """
    from torch._inductor import config
    from torch._inductor.graph import GraphLowering

    flags: list[tuple[bool, bool]] = []

    def read_flags(_: GraphLowering) -> None:
        flags.append((config.deterministic, config.loop_ordering_after_fusion))
        raise NotImplementedError("no code is needed here")

    monkeypatch.setattr(GraphLowering, "codegen", read_flags)
    monkeypatch.setattr(GraphLowering, "codegen_with_cpp_wrapper", read_flags)
    engine = tiny_engine(torch.bfloat16)
    compiling.compile_transformers(engine, OptimizationContext())
    with config.patch(fx_graph_cache=False), pytest.raises(Exception, match="no code is needed here"):
        velocity(engine, "none")
    assert flags == [(True, False)]


@pytest.mark.long
def test_every_compilation_gets_the_options() -> None:
    compiler = Counting()
    engine = tiny_engine(torch.bfloat16)
    for name in COMPILED:
        engine, _ = apply_optimizations(engine, [name], context=OptimizationContext(compiler))
    assert len(compiler.options) >= 3  # two classes of blocks, and the decoder
    assert all(options == compiling.INDUCTOR_OPTIONS for options in compiler.options)


@pytest.mark.parametrize("optimization", COMPILED)
def test_a_large_image_is_the_first_to_be_compiled(optimization: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor tunes the graph for all sizes by the first one."""
    drawn: list[Size] = []
    monkeypatch.setattr(compiling, "SIZES", WARM_UP_SIZES)
    monkeypatch.setattr(compiling, "run_once", lambda _, request, __: drawn.append(Size(request.width, request.height)))
    compiling.warm_up(tiny_engine(torch.bfloat16), optimization, lambda *_: None)
    assert drawn[0].width * drawn[0].height == 2**20 == max(size.width * size.height for size in drawn)


def made_fast(
    tmp_path: Path,
    *names: str,
    default: Sequence[str] = (),
    compiler: object = None,
) -> FluxEngine:
    """As loading does it on a device where `default` is that, with what is kept over starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "pipelines.loading.build.select_optimizations",
            lambda names, _: [name for name in OPTIMIZATIONS if name in (*names, *default)],
        )
        config, cache = EngineConfig(optimizations=names), TuningCache(tmp_path / "engine.json")
        engine, _ = optimize_engine(
            tiny_engine(torch.float32), "cpu", config, cache, lambda *_: None, compiler or Counting()
        )
    return engine


def test_the_fingerprint_tells_inexact_optimizations_apart_and_exact_ones_not(tmp_path: Path) -> None:
    def of(*names: str, chose: str = "native") -> str:
        kept = TuningCache(tmp_path / chose / "engine.json")
        kept.remember("attention", tiny_engine(torch.float32).info.fingerprint, lambda: chose)
        return made_fast(kept.path.parent, *names).info.fingerprint

    assert of() == of(*EXACT)
    assert len({of(), of("modulation"), of("vae_layout"), of("modulation", "vae_layout")}) == 4
    assert of("attention") != of("attention", chose="_native_math")


def test_the_attention_that_was_chosen_stays_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for answer in ("_native_math", "native"):
        monkeypatch.setattr("pipelines.optimize.attention.find_fastest", lambda _, answer=answer: answer)
        assert made_fast(tmp_path, "attention").info.optimizations == "attention (_native_math)"


def test_a_kernel_whose_package_is_missing_is_no_candidate_and_no_choice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = {"native": 1.0, "flash": 0.1, "_flash_3": 0.1}
    monkeypatch.setattr("pipelines.optimize.attention.measure_seconds", lambda *tensors: seconds[tensors[-1].value])
    monkeypatch.setattr("pipelines.optimize.attention.CANDIDATES", tuple(seconds))
    monkeypatch.setattr("pipelines.optimize.attention.dispatch_attention_fn", lambda query, *_, **__: query)
    engine = tiny_engine(torch.float32)
    assert find_fastest(engine.pipeline.transformer) == "native"
    for name in ("flash", "_flash_3"):
        kept = TuningCache(tmp_path / name / "engine.json")
        kept.remember("attention", engine.info.fingerprint, partial(str, name))
        assert made_fast(kept.path.parent, "attention").info.optimizations == "attention (native)"


def test_the_version_of_every_kernel_package_moves_the_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    def of(**versions: str) -> str:
        monkeypatch.setattr("pipelines.loading.fingerprint.read_installed_version", versions.get)
        return compute_fingerprint("cpu", "float32", {})

    packages = {package.replace("_", "-") for package in PACKAGES.values()}
    assert len(packages) == 2
    for package in packages:
        assert len({of(), of(**{package: "1"}), of(**{package: "2"})}) == 3


@pytest.mark.parametrize(
    ("message", "summary"),
    [
        (
            "at 1:0:\ndef kernel(a, b):\n^\nValueError('type fp8e4nv not supported')\n",
            "ValueError('type fp8e4nv not supported')",
        ),
        ("Found no NVIDIA driver on your system.\nPlease check", "Found no NVIDIA driver on your system."),
    ],
)
def test_a_compilers_error_is_told_by_the_line_that_says_what_is_wrong(message: str, summary: str) -> None:
    class BackendCompilerFailed(Exception):
        inner_exception = RuntimeError(message)

    assert summarize_error(BackendCompilerFailed()) == f"RuntimeError: {summary}"


@pytest.mark.parametrize(
    ("message", "lost"),
    [
        ("Triton Error [CUDA]: illegal memory access", True),
        ("CUDNN_STATUS_EXECUTION_FAILED", True),
        ("GET was unable to find an engine to execute this computation", False),
        ("No available kernel. Aborting execution.", False),
    ],
)
def test_an_attention_that_loses_the_device_ends_the_search(
    message: str, lost: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any other one that fails is left out."""

    def dispatch(query: torch.Tensor, *_: torch.Tensor, backend: Any) -> torch.Tensor:
        if backend.value == "_native_cudnn":
            raise RuntimeError(message)
        return query

    monkeypatch.setattr("pipelines.optimize.attention.dispatch_attention_fn", dispatch)
    transformer = tiny_engine(torch.float32).pipeline.transformer
    if lost:
        with pytest.raises(RuntimeError, match=message.split()[0]):
            find_fastest(transformer)
    else:
        assert find_fastest(transformer) != "_native_cudnn"


@pytest.mark.parametrize(("ratio", "chosen"), [(0.99, "native"), (0.9, "_native_efficient")])
def test_another_kernel_is_taken_only_where_it_is_clearly_faster(
    monkeypatch: pytest.MonkeyPatch, ratio: float, chosen: str
) -> None:
    seconds = {"_native_efficient": ratio, "native": 1.0}
    monkeypatch.setattr("pipelines.optimize.attention.CANDIDATES", tuple(seconds))
    monkeypatch.setattr("pipelines.optimize.attention.measure_seconds", lambda *tensors: seconds[tensors[-1].value])
    monkeypatch.setattr("pipelines.optimize.attention.dispatch_attention_fn", lambda query, *_, **__: query)
    assert find_fastest(tiny_engine(torch.float32).pipeline.transformer) == chosen


@pytest.mark.parametrize(("plans", "chosen"), [(0.1, "_native_cudnn"), (20.0, "_native_efficient")])
def test_a_kernel_that_plans_for_each_size_has_to_gain_more_than_that(
    monkeypatch: pytest.MonkeyPatch, plans: float, chosen: str
) -> None:
    """tiny has two blocks: half a second is gained 20 times in the ten steps of an image."""
    seconds, planned = {"native": 1.0, "_native_efficient": 0.9, "_native_cudnn": 0.5}, set()

    def measure(*inputs: Any) -> float:
        name, tokens = inputs[-1].value, inputs[0].shape[1]
        new = name == "_native_cudnn" and tokens not in planned
        planned.update([tokens] * new)
        return seconds[name] + plans * new

    monkeypatch.setattr("pipelines.optimize.attention.CANDIDATES", tuple(seconds))
    monkeypatch.setattr("pipelines.optimize.attention.measure_seconds", measure)
    monkeypatch.setattr("pipelines.optimize.attention.dispatch_attention_fn", lambda query, *_, **__: query)
    assert find_fastest(tiny_engine(torch.float32).pipeline.transformer) == chosen


@pytest.mark.long
@pytest.mark.parametrize(
    ("compiler", "default", "works"),
    [
        (
            Refusing(),
            select_optimizations(["default"], "cuda"),
            "texts, rotary, modulation, attention (native), vae_layout",
        ),
        (Wrong(), ["texts", "compile_vae"], "texts"),
    ],
    ids=["refusing", "wrong"],
)
def test_a_default_that_does_not_work_here_is_left_out_said_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiler: object, default: list[str], works: str
) -> None:
    """As on a GPU that the compiler does not know: the first start, and the next, which does not try again."""
    monkeypatch.setattr("pipelines.optimize.attention.find_fastest", lambda _: "native")
    request = ask(512, 512, 2, seed=4)
    first = made_fast(tmp_path, "default", default=default, compiler=compiler)
    assert first.info.optimizations.startswith(f"{works}; without compile")
    for reason in first.info.optimizations.split("; without ")[1:]:
        assert "which fails here: RuntimeError: no kernel image" in reason or "results are wrong" in reason
    failed = {key.split()[1] for key in TuningCache(tmp_path / "engine.json").section(FAILED_OPTIMIZATIONS)}
    assert failed == set(default) & set(COMPILED)
    counting = Counting()
    second = made_fast(tmp_path, "default", default=default, compiler=counting)
    assert second.info == first.info
    assert not counting.graphs
    assert draw(first, request) == draw(second, request)
    other = TuningCache(tmp_path / "other" / "engine.json")
    assert (
        first.info.fingerprint
        == made_fast(other.path.parent, *works.replace(" (native)", "").split(", ")).info.fingerprint
    )
    forget_results(tmp_path)
    assert not TuningCache(tmp_path / "engine.json").section(FAILED_OPTIMIZATIONS)


@pytest.mark.long
@pytest.mark.parametrize(
    "shortage",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cc1plus: error: /tmp/main.cpp: No space left on device"),
        RuntimeError("Failed to find C compiler. Please specify via CC environment variable."),
    ],
    ids=["memory", "disk", "cublas", "compiler", "no compiler"],
)
def test_a_shortage_is_said_but_the_next_start_tries_again(tmp_path: Path, shortage: Exception) -> None:
    class Short(Counting):
        def __call__(self, *_: Any, **__: Any) -> Callable[..., object]:
            raise shortage

    first = made_fast(tmp_path, "default", default=["texts", "compile_vae"], compiler=Short())
    assert first.info.optimizations.startswith("texts; without compile_vae, which fails here: ")
    assert not TuningCache(tmp_path / "engine.json").section(FAILED_OPTIMIZATIONS)
    assert made_fast(tmp_path, "default", default=["texts", "compile_vae"]).info.optimizations == "texts, compile_vae"


def test_an_optimization_that_was_named_must_work(tmp_path: Path) -> None:
    with pytest.raises(
        OptimizationFailed,
        match=r"^compile does .*: no kernel image. Without: SRPO_OPTIMIZATIONS=rotary$",
    ):
        made_fast(tmp_path, "default", "compile", default=["rotary"], compiler=Refusing())
    assert not TuningCache(tmp_path / "engine.json").section(FAILED_OPTIMIZATIONS)


def test_an_optimization_that_breaks_the_device_is_kept_and_a_new_process_goes_on_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CUDA error is sticky: nothing more can be done in that process, not even to undo."""

    def broken(_: object) -> str:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr("pipelines.optimize.attention.find_fastest", broken)
    with pytest.raises(OptimizationFailed, match="illegal memory access"):  # nothing would remember it
        apply_optimizations(tiny_engine(torch.float32), ["attention"], ["attention"])
    with pytest.raises(StartAgain, match="attention broke the device: AcceleratorError: CUDA error"):
        made_fast(tmp_path, "default", default=["texts", "attention"])
    engine = made_fast(tmp_path, "default", default=["texts", "attention"])
    assert engine.info.optimizations.startswith(
        "texts; without attention, which fails here: AcceleratorError: CUDA error"
    )


def test_what_is_pulled_by_default_and_what_is_refused() -> None:
    assert select_optimizations(("default",), "cpu") == EXACT
    assert set(select_optimizations(("default",), "cuda")) == set(OPTIMIZATIONS) - {"fp8", "qkv"}
    assert select_optimizations(("none",), "cuda") == []
    assert select_optimizations(("default", "fp8"), "cpu") == ["texts", "rotary", "fp8"]
    assert select_optimizations(("compile", "texts"), "cuda") == ["texts", "compile"]
    assert {optimization.accuracy for optimization in OPTIMIZATIONS.values()} == set(ACCURACIES)
    for wrong in (("warp",), ("none", "texts")):
        with pytest.raises(ValueError):
            validate_names(wrong)


def test_the_settings_tell_the_engine(tmp_path: Path) -> None:
    def engine(**fields: Any) -> EngineConfig:
        return build_engine_config(Settings(data_dir=tmp_path, **fields), tmp_path)

    assert engine().optimizations == ("default",)
    assert engine().compile_cache == str(tmp_path / "compiled")
    assert engine(optimizations="rotary, texts").optimizations == ("rotary", "texts")
    assert engine(compile_cache="/var/cache/srpo").compile_cache == "/var/cache/srpo"
    with pytest.raises(ValueError, match=r"warp.*no optimization"):
        engine(optimizations="warp")


def test_the_setting_is_a_variable_and_a_flag(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert parse(Settings, "serve", ["--optimizations", "rotary,texts"]).optimizations == ("rotary", "texts")
    monkeypatch.setenv("SRPO_OPTIMIZATIONS", "rotary")
    assert Settings().optimizations == ("rotary",)
    assert parse(Settings, "serve", ["--port", "0"]).optimizations == ("rotary",)
    assert parse(Settings, "serve", ["--optimizations=none"]).optimizations == ("none",)
    assert srpo(["serve", "--optimizations", "warp"]) == 2
    assert "SRPO_OPTIMIZATIONS (--optimizations): 'warp' is no optimization" in capsys.readouterr().err


def test_health_names_the_optimizations(live: LiveServer) -> None:
    health = httpx.get(f"{live.url}/health").json()
    assert health["optimizations"] == "texts, rotary"
