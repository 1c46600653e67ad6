"""Where the parts of a model go: the table, and that what it says is so."""

import contextlib
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import diffusers.hooks.group_offloading as hooks
import httpx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import load_file
from support.engines import ask, draw, weights_of
from support.scripted_server import Scripted
from support.server import LiveServer
from support.waiting import LIMIT, within

import pipelines.loading.build
import pipelines.loading.offload
from bench.quality import psnr
from bench.support.geometry import MODELS
from pipelines.allocator import VARIABLES, configure_allocator, rounds_pinned_memory
from pipelines.engine.base import EngineConfig
from pipelines.engine.flux import FluxEngine
from pipelines.loading import placement
from pipelines.loading.build import load_engine, load_one
from pipelines.loading.cards import Card, Holder
from pipelines.loading.placement import (
    BYTES,
    GIB,
    LARGEST,
    PLACEMENTS,
    STREAMED,
    DoesNotFit,
    Placement,
    choose_placement,
    get_placement,
    measure_host_memory,
)
from pipelines.optimize.apply import OptimizationFailed
from server.__main__ import main as srpo
from server.engine_setup import build_engine_config
from server.settings.engine import EngineSettings
from server.settings.server import Settings
from weights import tiny
from weights.checkpoints import CHECKPOINTS, ParameterCounts
from weights.formats.architecture import BLOCK_LINEARS

SRPO = CHECKPOINTS["flux/srpo"]
AUTO = [name for name, spec in PLACEMENTS.items() if spec.automatic]
MIXED = [("none", 2), ("high", 12), ("none", 3), ("high", 12), ("regular", 12)]  # skipped steps run few of the layers


def card(total: float, free: float | None = None) -> Card:
    return Card("a card", int(total * GIB), int((total if free is None else free) * GIB))


def config(placement: str, model: str = "tiny", dtype: str = "bfloat16", **more: Any) -> EngineConfig:
    return EngineConfig(model, device="cpu", dtype=dtype, placement=placement, **more)


def engine_at(placement: str, model: str = "tiny", dtype: str = "bfloat16", **more: Any) -> FluxEngine:
    engine = load_engine(config(placement, model, dtype, **more), lambda *_: None)
    assert isinstance(engine, FluxEngine)
    return engine


def pictures(engine: FluxEngine) -> list[bytes]:
    return [draw(engine, ask(steps=steps, acceleration=preset, seed=5))[0] for preset, steps in MIXED]


@pytest.mark.parametrize(
    ("total", "name"),
    [
        *[(total, "resident") for total in (139.8, 79.1, 47.5, 39.4)],
        (31.4, "offload-text"),
        (23.5, "float8"),
        *[(total, "float8-offload") for total in (19.6, 15.7, 11.6, 7.7)],
    ],
)  # as the driver counts cards of 141, 80, 48, 40, 32, 24, 20, 16, 12 and 8 GB
def test_the_total_memory_chooses(total: float, name: str) -> None:
    chosen = choose_placement(SRPO, "bfloat16", card(total))
    assert chosen.name == name
    said = str(chosen)
    assert said.startswith(f"{name}: ")
    assert f"about {chosen.needed / GIB:.0f} GiB of its memory" in said
    assert ("GiB of the host's memory" in said) == ("a new prompt waits" in said) == (name != "resident")
    assert ("other pictures" in said) == ("float8" in name) == bool(chosen.notes)
    assert ("room for a second copy" in said) == (total > 45)
    assert choose_placement(CHECKPOINTS["flux/sketch"], "bfloat16", card(total)).name == "resident"


@given(
    st.lists(st.integers(0, 160 * GIB), min_size=2, max_size=2),
    st.floats(0, 1),
    st.sampled_from(sorted(BYTES)),
    st.sampled_from(["flux/srpo", "flux/dev", "flux/schnell"]),
)
@settings(derandomize=True, deadline=None, max_examples=300)
def test_more_memory_never_gives_less_and_nothing_exceeds_it(
    totals: list[int], free: float, precision: str, model: str
) -> None:
    row, rank = CHECKPOINTS[model], []
    for total in sorted(totals):
        try:
            chosen = choose_placement(row, precision, Card("a card", total, total))
        except DoesNotFit:
            rank.append(len(AUTO))
            continue
        assert chosen.needed <= total
        rank.append(AUTO.index(chosen.name))
        partly = Card("a card", total, int(total * free))  # the same choice, or an error
        if chosen.needed <= partly.free:
            assert choose_placement(row, precision, partly) == chosen
        else:
            with pytest.raises(DoesNotFit, match=f"--placement {chosen.name} .* are free"):
                choose_placement(row, precision, partly)
    assert rank == sorted(rank, reverse=True)


def test_a_wish_is_obeyed_or_refused_with_what_would_fit() -> None:
    assert choose_placement(SRPO, "bfloat16", card(79), wanted="float8-offload").name == "float8-offload"
    assert choose_placement(SRPO, "bfloat16", card(11.6), wanted="offload").precision == "bfloat16"
    with pytest.raises(DoesNotFit, match=r"a card has 24\. --placement float8, float8-offload, offload would fit"):
        choose_placement(SRPO, "bfloat16", card(23.5), wanted="resident")
    with pytest.raises(DoesNotFit, match=r"a card has 3\. Use a larger card, or --devices cpu$"):
        choose_placement(SRPO, "bfloat16", card(3))
    with pytest.raises(DoesNotFit, match=r"about 17 GiB .* has 16\. --placement float8-offload, offload would fit"):
        choose_placement(SRPO, "bfloat16", card(15.7), wanted="float8")


@pytest.mark.parametrize(("total", "wanted", "name"), [(19.6, "float8", "float8"), (5.8, "auto", "float8-offload")])
def test_where_the_largest_images_have_no_room_smaller_ones_are_drawn(total: float, wanted: str, name: str) -> None:
    chosen = choose_placement(SRPO, "bfloat16", card(total), wanted=wanted)
    assert chosen.name == name
    assert chosen.max_pixels is not None
    assert 2**20 < chosen.max_pixels < LARGEST
    assert chosen.needed < total * GIB
    assert re.search(r"; images of up to 1\.\d\d? megapixels \((\d+)x\1\)$", str(chosen))
    assert choose_placement(SRPO, "bfloat16", card(24), wanted="float8").max_pixels is None


def test_an_image_that_has_no_room_is_refused_before_it_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the sizes in the message; one of as many pixels as have room is drawn."""
    monkeypatch.setenv("SCRIPTED_MAX_PIXELS", str(1440 * 512))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    with Scripted(tmp_path) as server:
        drawn, refused = (
            httpx.post(
                f"{server.url}/v1/images/generations",
                json={"model": "flux/srpo", "prompt": "a cat", "image_size": {"width": 1440, "height": height}},
            )
            for height in (512, 544)
        )
        assert httpx.get(f"{server.url}/health").json()["max_pixels"] == 1440 * 512
    assert (drawn.status_code, refused.status_code) == (201, 400)
    error = refused.json()["error"]
    assert error["code"] == "image_too_large"
    assert "1440x544 does not fit" in error["message"]
    assert "737280 pixels, such as 832x832" in error["message"]


@pytest.mark.parametrize(
    "ask_too_much",
    [
        lambda: choose_placement(SRPO, "bfloat16", card(3)),
        lambda: choose_placement(SRPO, "bfloat16", card(23.5), wanted="resident"),
        lambda: choose_placement(SRPO, "bfloat16", card(23.5, 9)),
        lambda: choose_placement(SRPO, "bfloat16", card(11.6), host=GIB),
    ],
)
def test_every_flag_that_is_advised_exists(ask_too_much: Callable[[], object]) -> None:
    with pytest.raises(DoesNotFit) as raised:
        ask_too_much()
    advised = re.findall(r"--([a-z-]+)", str(raised.value))
    assert advised
    assert {flag.replace("-", "_") for flag in advised} <= set(Settings.model_fields)


def test_too_little_free_memory_names_who_holds_it() -> None:
    with pytest.raises(DoesNotFit, match=r"only 9\.0 are free\. Held by: python3 \(pid 41\) 14\.5 GiB\."):
        choose_placement(SRPO, "bfloat16", card(23.5, 9), [Holder("41", "python3", int(14.5 * GIB))])


def test_pinned_memory_is_counted_as_it_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    assert version("torch") >= "2.13"
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    exact = get_placement(SRPO, "bfloat16", "float8-offload").host
    assert exact == PLACEMENTS["float8-offload"].host_bytes(SRPO.sizes, "bfloat16")
    worker: dict[str, str] = {}
    configure_allocator(worker)
    for environment in (worker, {VARIABLES[1]: worker[VARIABLES[0]]}):
        assert not rounds_pinned_memory(environment)
    assert rounds_pinned_memory({VARIABLES[0]: "pinned_max_cached_size_mb:64"})
    for name in VARIABLES:
        with monkeypatch.context() as patch:
            patch.setenv(name, "expandable_segments:True")
            assert get_placement(SRPO, "bfloat16", "float8-offload").host > 1.4 * exact
    monkeypatch.setattr("pipelines.allocator.version", lambda _: "2.12.1+cu130")
    assert get_placement(SRPO, "bfloat16", "float8-offload").host > 1.4 * exact
    older: dict[str, str] = {}
    configure_allocator(older)
    assert older == {VARIABLES[0]: "expandable_segments:True"}


def test_torch_takes_the_workers_settings_of_its_allocators() -> None:
    """Their names are read by all builds of torch; one that is wrong is refused."""
    program = (
        "import torch\n"
        "set_up = torch._C._accelerator_setAllocatorSettings\n"
        "set_up('pinned_max_cached_size_mb:8')\n"
        "try:\n"
        "    set_up('pinned_max_cached_size_mb:x')\n"
        "except (RuntimeError, ValueError):\n"
        "    print('refused')"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (0, "refused\n"), ended.stderr


def test_the_memory_that_is_rounded_all_the_same_is_little() -> None:
    """What is not larger than 8 MiB: vectors, and CLIP."""
    pipeline = MODELS["flux"](torch.bfloat16, torch.device("meta")).pipeline
    parts = [pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2]
    sizes = [2 * tensor.numel() for part in parts for tensor in part.parameters()]
    added = sum((1 << (size - 1).bit_length()) - size for size in sizes if size <= 2**23)
    assert added < 0.25 * GIB


def test_the_host_must_hold_what_waits_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLES[0], "expandable_segments:True")  # an operator's own: pinned memory is rounded
    assert choose_placement(SRPO, "bfloat16", card(79), host=GIB).name == "resident"
    assert choose_placement(SRPO, "bfloat16", card(11.6), host=34 * GIB).name == "float8-offload"
    with pytest.raises(DoesNotFit, match="float8-offload keeps 34 GiB in the host's memory, which has 32"):
        choose_placement(SRPO, "bfloat16", card(11.6), host=32 * GIB)
    with pytest.raises(DoesNotFit, match=r"keeps 34 GiB in the host's memory for each of 2 devices, which has 64\."):
        choose_placement(SRPO, "bfloat16", card(11.6), host=64 * GIB, processes=2)
    assert choose_placement(SRPO, "bfloat16", card(11.6), host=68 * GIB, processes=2).name == "float8-offload"
    monkeypatch.setattr(placement, "LIMIT", tmp_path / "memory.max")
    whole = measure_host_memory()
    (tmp_path / "memory.max").write_text("max\n")
    assert measure_host_memory() == whole > GIB
    (tmp_path / "memory.max").write_text(f"{GIB}\n")
    assert measure_host_memory() == GIB


def test_the_rows_sizes_are_those_of_flux_1_devs_classes() -> None:
    pipeline = MODELS["flux"](torch.bfloat16, torch.device("meta")).pipeline
    assert SRPO.sizes == sizes_of(pipeline)
    assert SRPO.pinned == sizes_of(pipeline, lambda tensor: 1 << (tensor.numel() - 1).bit_length())
    for row in CHECKPOINTS.values():
        assert any(row.pinned) == any(row.sizes)


def sizes_of(pipeline: Any, measure: Callable[[torch.Tensor], int] = torch.Tensor.numel) -> ParameterCounts:
    def count(*parts: Any) -> int:
        return sum(measure(tensor) for part in parts for tensor in part.parameters())

    named = dict(pipeline.transformer.named_parameters())
    blocks = sum(measure(tensor) for name, tensor in named.items() if BLOCK_LINEARS.fullmatch(name))
    texts = count(pipeline.text_encoder, pipeline.text_encoder_2)
    return ParameterCounts(blocks, count(pipeline.transformer) - blocks, texts, count(pipeline.vae))


@pytest.mark.parametrize("name", PLACEMENTS)
def test_the_table_says_the_bytes_that_an_engine_has(name: str) -> None:
    spec, sizes = PLACEMENTS[name], sizes_of(tiny.build())
    pipeline = engine_at(name).pipeline
    held = {"card": 0, "host": 0, "scales": 0}
    for part in ("transformer", "text_encoder", "text_encoder_2", "vae"):
        where = "host" if part in spec.streamed else "card"
        held[where] += sum(tensor.numel() * tensor.element_size() for tensor in getattr(pipeline, part).parameters())
    assert held["card"] == spec.card_bytes(sizes, "bfloat16") - (STREAMED if spec.streamed else 0)
    assert held["host"] == spec.host_bytes(sizes, "bfloat16")


@pytest.mark.parametrize("model", ["tiny", "flux/sketch"])
@pytest.mark.parametrize(("name", "like"), [("offload", "resident"), ("offload-text", "resident")])
def test_where_parts_wait_changes_no_byte_and_no_fingerprint(model: str, name: str, like: str) -> None:
    one, other = engine_at(name, model), engine_at(like, model)
    assert draw(one, ask(steps=2, seed=5)) == draw(other, ask(steps=2, seed=5))
    assert one.info.fingerprint == other.info.fingerprint
    assert one.info.placement != other.info.placement


class LateStream:
    """Copies what it is told to only when it is waited for; until then there is nothing but NaN."""

    def __init__(self) -> None:
        self.queue: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.copied = self.ahead = 0

    def synchronize(self) -> None:
        for target, source in self.queue:
            target.copy_(source)
        self.copied += len(self.queue)
        self.queue.clear()


class LateDevice:
    """In the place of diffusers' view of a CUDA device."""

    def __init__(self, device: torch.device) -> None: ...

    def stream(self, stream: LateStream) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def current_stream(self) -> LateStream:
        return LateStream()


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> LateStream:
    """Streams as on CUDA, on a device that is late with everything that nobody waits for."""
    stream = LateStream()

    def transfer(self: Any, tensor: torch.Tensor, source: torch.Tensor, _: Any) -> None:
        tensor.data = torch.full_like(source.float(), float("nan")).to(source.dtype)
        stream.queue.append((tensor.data, source))
        stream.ahead += self.non_blocking
        if not self.non_blocking:
            stream.synchronize()

    def offload(part: Any, device: torch.device, **_: Any) -> None:
        kind = hooks.GroupOffloadingType.LEAF_LEVEL  # "cpu:0": another name for where layers wait: what came is told
        how = hooks.GroupOffloadingConfig(device, torch.device("cpu:0"), kind, False, False, False, stream=stream)
        hooks._apply_group_offloading(part, how)

    monkeypatch.setattr(pipelines.loading.offload, "apply_group_offloading", offload)
    monkeypatch.setattr(hooks, "TorchDeviceBackend", LateDevice)
    monkeypatch.setattr(hooks.ModuleGroup, "_transfer_tensor_to_device", transfer)
    monkeypatch.setattr(hooks.ModuleGroup, "_to_cpu", staticmethod(lambda tensor, _: tensor.data.clone()))
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda *_: True)
    return stream


@pytest.mark.parametrize(("name", "like"), [("offload", "resident"), ("float8-offload", "float8")])
def test_copying_ahead_is_waited_for_whatever_the_order_of_layers(name: str, like: str, late: LateStream) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipelines.loading.build, "stream_parts", lambda *_: None)
        expected = pictures(engine_at(like))
    streamed = engine_at(name)
    late.copied = late.ahead = 0
    assert pictures(streamed) == expected
    assert late.copied > 1000
    assert late.ahead > 0.9 * late.copied


@pytest.mark.long
def test_float8_keeps_a_scale_a_row_and_stays_close(tmp_path: Path) -> None:
    wide, narrow = (engine_at(name, "flux/sketch") for name in ("resident", "float8"))
    stored, before = weights_of(narrow), weights_of(wide)
    for name, tensor in before.items():
        if BLOCK_LINEARS.fullmatch(name):
            assert stored[name].dtype == torch.float8_e4m3fn
            rows = stored[name].float() * stored[f"{name}_scale"]
            assert ((rows - tensor.float()).abs() <= tensor.float().abs().amax(1, keepdim=True) / 16).all()
        else:
            assert torch.equal(stored[name], tensor)
    drawn, exact = (
        torch.frombuffer(bytearray(draw(engine, ask(steps=4, seed=5))[0]), dtype=torch.uint8)
        for engine in (narrow, wide)
    )
    assert 15 < psnr(drawn, exact) < 60
    assert narrow.info.fingerprint != wide.info.fingerprint


def test_a_file_of_ours_in_float8_is_served_as_it_is(tmp_path: Path) -> None:
    tiny.build().transformer.save_pretrained(tmp_path / "transformer")
    assert srpo(["weights", "convert", str(tmp_path / "transformer"), str(tmp_path / "file"), "--to", "fp8"]) == 0
    file, served = load_file(tmp_path / "file"), weights_of(engine_at("float8", transformer=str(tmp_path / "file")))
    for name, tensor in file.items():
        if BLOCK_LINEARS.fullmatch(name):
            values = [part[name].float() * part[f"{name}_scale"] for part in (file, served)]
            torch.testing.assert_close(*values)
            assert served[name].dtype == tensor.dtype


def test_the_setting_offers_the_table() -> None:
    with pytest.raises(ValidationError, match=f"one of auto, {', '.join(PLACEMENTS)}"):
        EngineSettings(placement="float9")
    assert build_engine_config(EngineSettings(placement="float8")).placement == "float8"


@pytest.mark.long
def test_a_server_says_how_it_has_placed_the_model(serve: Callable[..., LiveServer], live: LiveServer) -> None:
    server = serve("--placement", "float8-offload", dtype="bfloat16")
    health = httpx.get(f"{server.url}/health").json()
    expected = Placement("float8-offload", "bfloat16")
    assert (health["placement"], health["dtype"]) == (str(expected), "bfloat16, the blocks' weights in float8")
    reply = server.generate(prompt="a cat")
    assert reply.status_code == 201
    assert reply.json()["timings"]["notes"] == list(expected.notes)
    assert "notes" not in live.generate(prompt="a cat").json()["timings"]
    line = f"Placement {expected} (--placement chooses another)"
    assert within(LIMIT, lambda: line in server.shown())


def test_what_an_engine_needs_is_said_while_it_loads() -> None:
    stages: list[str] = []
    load_engine(config("offload"), lambda stage, _: stages.append(stage))
    assert any("placing (offload: " in stage for stage in stages)


def test_a_streamed_transformer_takes_only_what_is_exact() -> None:
    stages: list[str] = []
    with pytest.raises(OptimizationFailed, match=r"^attention .*: it needs .*SRPO_OPTIMIZATIONS=default$"):
        load_engine(config("offload", optimizations=("default", "attention")), lambda stage, _: stages.append(stage))
    assert stages == ["reading the weights"]  # before minutes of it


def test_a_shared_transformer_takes_only_what_is_exact() -> None:
    joined: list[object] = []
    named = config("resident", optimizations=("default", "attention"))
    with pytest.raises(OptimizationFailed, match=r"^attention .*: it needs .*SRPO_OPTIMIZATIONS=default$"):
        load_one(named, lambda *_: None, lambda *parts: joined.append(parts))
    assert not joined  # nor are the weights read


def test_the_second_copy_that_fp8_makes_is_counted_where_it_is_wanted() -> None:
    """Of a card of 48 GB, 44.5 GiB can be used: the whole model has room there, and no second copy."""
    assert choose_placement(SRPO, "bfloat16", card(44.5)).name == "resident"
    chosen = choose_placement(SRPO, "bfloat16", card(44.5), fp8=True)
    assert (chosen.name, chosen.room) == ("offload-text", False)
    assert chosen.needed == get_placement(SRPO, "bfloat16", "offload-text").needed + SRPO.sizes.blocks
    assert choose_placement(SRPO, "bfloat16", card(79), fp8=True).name == "resident"
    with pytest.raises(DoesNotFit, match=r"needs about 45 GiB .* only 45\.0 are free"):
        choose_placement(SRPO, "bfloat16", card(79, 45), fp8=True)
    smaller = choose_placement(SRPO, "bfloat16", card(44.5), wanted="resident", fp8=True)
    assert smaller.max_pixels is not None
    assert smaller.needed <= 44.5 * GIB
    for name in ("float8", "float8-offload", "offload"):
        assert get_placement(SRPO, "bfloat16", name, fp8=True) == get_placement(SRPO, "bfloat16", name)


def test_the_working_memory_is_part_of_what_is_needed() -> None:
    needed = choose_placement(SRPO, "bfloat16", card(80)).needed
    assert needed == 2 * sum(SRPO.sizes) + placement.working_bytes(LARGEST, "bfloat16")
    assert 5.9 * GIB < placement.working_bytes(LARGEST, "bfloat16") < 6.1 * GIB
