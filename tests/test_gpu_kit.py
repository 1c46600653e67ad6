"""What is run first when a GPU is at hand, rehearsed on a CPU: every stage's own code, one failure, and going on."""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import support.convolution  # noqa: F401
import torch
from support.compilers import torch_as_it_was
from support.waiting import LIMIT, within

from bench.gpu import __main__ as kit
from bench.gpu import card, speed, variants
from bench.gpu.predictions import PREDICTIONS
from bench.gpu.repeat import draw_elsewhere
from bench.gpu.setup import NEEDS_CUDA, Results, Setup
from bench.gpu.sizes import NEW
from bench.gpu.stages import STAGES, Stage
from bench.support import server_process
from bench.support.comparison import find_device_wait, make_request
from bench.support.server_process import start_server
from pipelines.engine.flux import FluxEngine
from pipelines.optimize import compile as compiling
from pipelines.optimize.compile import INDUCTOR_OPTIONS
from pipelines.request import ImageRequest


@pytest.fixture(autouse=True)
def _torch_as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, "")
    with torch_as_it_was():
        yield


def results(folder: Path) -> dict[str, dict[str, Any]]:
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in kit.STAGES}


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.*progress")
def test_a_rehearsal_runs_every_stage_and_a_second_one_none(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = ["--rehearse", "--here", "--folder", str(tmp_path)]
    failed = kit.main(command)
    stages = results(tmp_path)
    assert {name: stage.get("error") for name, stage in stages.items()} == dict.fromkeys(STAGES)
    assert not failed
    figures = {name: stage["figures"] for name, stage in stages.items()}
    assert figures["card"]["ceiling float8, TFLOP/s"] == NEEDS_CUDA
    assert figures["tiny"]["the same bytes"] is True
    assert figures["bf16"]["step 512x512, ms"] > figures["bf16"]["skipped_step 512x512, ms"] > 0
    assert "float8" in figures["fp8"]["optimizations that fail here"]["fp8"].lower()
    assert figures["variants"]["defaults, ms"] > 0 < figures["variants"]["QKV fused, ms"]
    assert figures["sizes"]["of 2 sizes eager"] == 0
    assert figures["pixels"]["the same bytes"] is True
    assert figures["memory"]["out of memory"] == NEEDS_CUDA
    assert figures["server"]["worker killed: the same bytes"] is True
    assert "aten::" in (tmp_path / figures["bf16"]["profile 512x512"]).read_text()
    table = (tmp_path / "table.md").read_text()
    assert all(
        f"| {stage} | {figure} | {value} |" in table
        for stage in PREDICTIONS
        for figure, value in PREDICTIONS[stage].items()
    )
    written = {file: file.stat().st_mtime_ns for file in tmp_path.glob("*.json")}
    capfd.readouterr()
    assert kit.main(command) == 0
    assert "0 stages in" in capfd.readouterr().out
    assert written == {file: file.stat().st_mtime_ns for file in tmp_path.glob("*.json")}


def test_all_is_through_in_less_than_25_minutes() -> None:
    assert sum(stage.minutes for stage in STAGES.values()) < 25
    assert set(PREDICTIONS) == set(STAGES)


@pytest.mark.parametrize("size", [*NEW, *Setup(Path(), rehearse=False).sizes, (1536, 1536), (512, 512)])
def test_every_size_that_is_asked_for_is_one_of_the_api(size: tuple[int, int]) -> None:
    request = make_request(*size, 28, "high")
    assert (request.width, request.height) == size


def test_variants_that_are_compiled_otherwise_have_a_compile_cache_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders: dict[int, tuple[object, ...]] = {}

    def compare(setup: Setup, names: object, compiled: str) -> SimpleNamespace:
        folders[len(folders)] = (compiled, compiling.SIZES, dict(INDUCTOR_OPTIONS))
        return SimpleNamespace(failed={"compile": "not here"})

    monkeypatch.setattr(Setup, "compare", compare)
    monkeypatch.setattr(Setup, "on_cuda", lambda _, measure: measure())
    monkeypatch.setattr(variants, "measure_attention", lambda *_: 1.0)
    list(variants.measure(Setup(tmp_path, rehearse=False)))
    kinds = {str(kind): name for name, *kind in folders.values()}
    assert len(kinds) == len(set(kinds.values())) == 3


def test_what_a_stage_has_started_ends_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script, pid = tmp_path / "stage", tmp_path / "pid"
    script.write_text(f"#!/bin/sh\nsleep 600 &\necho $! > {pid}.new; mv {pid}.new {pid}\nwait\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    monkeypatch.setattr(kit, "STAGES", {"card": STAGES["card"]._replace(minutes=10 / 60 / kit.SLACK)})
    assert kit.main(["--folder", str(tmp_path), "--stages", "card"]) == 1
    assert results(tmp_path)["card"]["error"] == "took more than 10 s"
    status = Path(f"/proc/{pid.read_text().strip()}/stat")

    def has_ended() -> bool:
        try:
            return status.read_text().rpartition(")")[2].split()[0] == "Z"
        except (FileNotFoundError, ProcessLookupError):
            return True

    assert within(LIMIT, has_ended)


class WaitingEngine:
    """Says what CUDA's check says where a step waits, or fails with something else."""

    device = torch.device("cuda")

    def __init__(self, message: str | None) -> None:
        self.message = message

    def prepare(self, request: ImageRequest) -> list[Any]:
        return []

    def step(self, samples: list[Any]) -> None:
        if self.message:
            raise RuntimeError(self.message)


def test_who_waits_for_the_device_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    request = make_request(512, 512, 2, "none")
    assert find_device_wait(cast(FluxEngine, WaitingEngine(None)), request) == []
    waits = find_device_wait(cast(FluxEngine, WaitingEngine("called a synchronizing CUDA operation")), request)
    assert waits
    assert re.fullmatch(r"tests/test_gpu_kit\.py:\d+ step", waits[-1])
    with pytest.raises(RuntimeError, match="an illegal memory access"):
        find_device_wait(cast(FluxEngine, WaitingEngine("an illegal memory access")), request)
    assert modes == ["error", "default"] * 3


def test_a_server_that_ends_or_is_never_ready_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "server.log"
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho no driver >&2\n[ -e $0.stay ] && exec sleep 600\nexit 3\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    with pytest.raises(RuntimeError, match="ended with 3:\nno driver"), start_server("tiny", log=log):
        pass
    assert log.read_text() == "no driver\n"
    Path(f"{script}.stay").touch()
    monkeypatch.setattr(server_process, "READY", 10)
    with pytest.raises(RuntimeError, match="not ready after 10 s:\nno driver"), start_server("tiny"):
        pass


def test_the_last_lines_of_a_process_that_fails_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\nseq 1 40 >&2\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    with pytest.raises(RuntimeError) as raised:
        draw_elsewhere("load", {})
    assert str(raised.value).splitlines() == ["40", *map(str, range(11, 41))]


def test_what_the_card_cannot_do_is_its_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("torch._scaled_mm is only supported on CUDA devices with compute capability >= 9.0\nmore")

    monkeypatch.setattr(torch, "_scaled_mm", refuse)
    monkeypatch.setattr(Setup, "on_cuda", lambda _, measure: measure() if measure.__name__ == "<lambda>" else "")
    monkeypatch.setattr(card, "read_driver_version", lambda: "")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(card, "measure_copies", lambda *_: 1.0)
    figures = dict(card.measure(Setup(tmp_path, rehearse=True)))
    assert figures["ceiling float8, TFLOP/s"].startswith("RuntimeError: torch._scaled_mm is only supported on")
    assert figures["native attention"]
    assert (figures["os.pidfd_open"], figures["import of server.app"]) == ("works", "works")


def test_bfloat16_is_never_recorded_as_float8(tmp_path: Path) -> None:
    figures = dict(speed.measure_fp8(Setup(tmp_path, rehearse=True)))
    assert figures.keys() == {"optimizations that fail here"}


RUNS: list[str] = []


def fail(_: Setup) -> Results:
    RUNS.append("fail")
    yield "before", 1.5
    raise RuntimeError("GET was unable to find an engine")


def succeed(_: Setup) -> Results:
    RUNS.append("succeed")
    yield "figure", 2.0


@pytest.mark.long
def test_a_stage_that_fails_keeps_its_figures_and_its_words_and_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    RUNS.clear()
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(kit, "STAGES", {name: Stage("", 1, f"{__name__}:{name}") for name in ("fail", "succeed")})
    command = ["--rehearse", "--here", "--folder", str(tmp_path), "--stages", "fail,succeed"]
    for runs in (["fail", "succeed"], ["fail", "succeed", "fail"]):
        assert kit.main(command) == 1
        assert runs == RUNS
        assert "RuntimeError: GET was unable to find an engine" in capsys.readouterr().out
        failed = results(tmp_path)["fail"]
        assert failed["figures"] == {"before": 1.5}
        assert failed["state"] == "failed"
        assert results(tmp_path)["succeed"]["figures"] == {"figure": 2.0}


@pytest.mark.long
def test_a_process_that_dies_or_hangs_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["--rehearse", "--folder", str(tmp_path), "--stages", "card"]
    monkeypatch.setattr(kit, "STAGES", {"card": STAGES["card"]._replace(minutes=0.0)})
    assert kit.main(command) == 1
    assert results(tmp_path)["card"]["error"] == "took more than 0 s"
    monkeypatch.setattr(kit, "STAGES", {"card": STAGES["card"]})
    with monkeypatch.context() as dying:
        dying.setattr(sys, "executable", "/bin/false")
        (tmp_path / "card.json").unlink()
        assert kit.main(command) == 1
    assert results(tmp_path)["card"]["error"] == "the process ended with 1"
    assert kit.main(command) == 0
    assert results(tmp_path)["card"]["state"] == "done"
    other = results(tmp_path)["card"] | {"device": "another card"}
    (tmp_path / "card.json").write_text(json.dumps(other))
    with pytest.raises(SystemExit):
        kit.main(["--rehearse", "--here", "--folder", str(tmp_path), "--stages", "card"])
