"""Which device an engine gets, and which are refused."""

import sys
from types import ModuleType

import pytest
import torch
from structlog.testing import capture_logs
from support.nvml import FakeNvml

from pipelines.engine.base import EngineConfig
from pipelines.loading.build import load_engine
from pipelines.loading.devices import DeviceRefused, choose_device
from weights.checkpoints import CHECKPOINTS

SRPO, SKETCH, TINY = (CHECKPOINTS[name] for name in ("flux/srpo", "flux/sketch", "tiny"))


@pytest.fixture
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch for CUDA 13.0 that finds no device."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    """A driver with one card."""
    fake = FakeNvml([("NVIDIA H200", 2**37, 2**37)], [])
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    return fake


@pytest.mark.usefixtures("no_cuda")
def test_a_full_size_model_is_on_a_cpu_only_where_that_is_asked_for() -> None:
    assert choose_device("cpu", SRPO).type == "cpu"
    with pytest.raises(DeviceRefused, match=r"^flux/srpo needs a GPU, and no NVIDIA driver .* --devices cpu$"):
        choose_device("auto", SRPO)
    assert [choose_device("auto", row).type for row in (SKETCH, TINY)] == ["cpu", "cpu"]
    with pytest.raises(DeviceRefused, match=r"^cuda cannot be used: no NVIDIA driver answers"):
        choose_device("cuda", TINY)


@pytest.mark.usefixtures("no_cuda")
def test_a_driver_that_is_too_old_for_torch_is_said_at_the_start(nvml: ModuleType) -> None:
    with pytest.raises(DeviceRefused, match=r"driver 570\.1 runs CUDA up to 12\.8, .* install driver 580 or newer"):
        choose_device("cuda", TINY)


@pytest.mark.usefixtures("no_cuda")
def test_a_card_that_torch_cannot_use_is_named(nvml: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    with pytest.raises(DeviceRefused, match=r"torch cannot use NVIDIA H200"):
        choose_device("auto", SRPO)


def test_loading_pins_the_algorithms_of_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    load_engine(EngineConfig("tiny", device="cpu"), lambda *_: None)
    assert torch.backends.cudnn.deterministic
    assert not torch.backends.cudnn.benchmark


def test_an_amd_card_is_used_only_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "AMD Instinct MI300X")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: pytest.fail("it has none"))
    with pytest.raises(DeviceRefused, match=r"^flux/srpo needs a GPU, and AMD cards are untried: --devices cuda"):
        choose_device("auto", SRPO)
    assert choose_device("auto", TINY).type == "cpu"
    with capture_logs() as logs:
        assert choose_device("cuda", SRPO).type == "cuda"
    assert [(line["event"], line["card"]) for line in logs] == [("device_untried", "AMD Instinct MI300X")]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceRefused, match=r"^cuda cannot be used: this torch is built for AMD cards \(ROCm 6\.4\)"):
        choose_device("cuda", TINY)


@pytest.mark.parametrize("device", ["auto", "cuda"])
@pytest.mark.parametrize("capability", [(7, 0), (7, 5), (8, 0), (8, 9), (9, 0), (12, 0)])
def test_cuda_is_taken_from_compute_capability_8_on(
    device: str, capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    if capability >= (8, 0):
        assert choose_device(device, SRPO).type == "cuda"
        return
    with pytest.raises(DeviceRefused, match=rf"^a card has compute capability 7\.{capability[1]}, and 8\.0 or newer"):
        choose_device(device, SRPO)
