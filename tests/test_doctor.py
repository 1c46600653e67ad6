"""`srpo doctor`, and what it asks the driver."""

import json
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pynvml
import pytest
import torch
from support.buckets import S3Service
from support.nvml import FakeNvml
from support.postgres import PASSWORD, Postgres
from support.scripted_server import Scripted
from support.server import free_port

from pipelines.loading.cards import Card, DriverUnavailable, Holder, list_cards, list_holders
from server.cli import doctor
from weights import tiny

GIB = 2**30


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeNvml]:
    """A driver with one card, sizes in MiB, and a host with room."""

    def install(name: str, total: int, free: int, *processes: tuple[int, int | None]) -> FakeNvml:
        fake = FakeNvml([(name, total * 2**20, free * 2**20)], list(processes))
        monkeypatch.setitem(sys.modules, "pynvml", fake)
        monkeypatch.setattr(doctor, "measure_host_memory", lambda: 64 * GIB)
        return fake

    return install


def test_the_drivers_answer_is_understood(driver: Any) -> None:
    nvml = driver("NVIDIA H200", 143771, 143000, (18, None), (17, GIB // 2))
    assert list_cards() == [Card("NVIDIA H200", 143771 * 2**20, 143000 * 2**20, "570.1", 12080, (9, 0))]
    assert list_holders() == [Holder("17", "python", GIB // 2), Holder("18", "unknown", 0)]
    assert not nvml.open


@pytest.fixture
def no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", fail)


def test_a_machine_without_a_driver_is_told_so(no_driver: None, examine: Any) -> None:
    with pytest.raises(DriverUnavailable, match="Shared Library Not Found"):
        list_cards()
    assert list_holders() == []
    expected = "no NVIDIA driver answers (NVML Shared Library Not Found)"
    assert examine()[1]["gpu"] == {"state": "warning", "text": f"{expected}: the CPU draws, slowly"}
    assert examine("--model", "flux/dev")[1]["placement"]["state"] == "failed"
    assert examine("--model", "flux/dev", "--devices", "cpu")[1]["placement"]["state"] == "ok"
    assert examine("--devices", "cuda:0")[1]["gpu"] == {"state": "failed", "text": expected}


@pytest.fixture
def examine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, dict[str, Any]]]:
    """The doctor's exit code and findings."""

    def run(*arguments: str) -> tuple[int, dict[str, Any]]:
        capsys.readouterr()
        folders = ["--models-dir", str(tmp_path / "models"), "--data-dir", str(tmp_path)]
        port = [] if "--port" in arguments else ["--port", "0"]
        code = doctor.main(["--json", *folders, *port, *arguments])
        said = json.loads(capsys.readouterr().out)
        assert said["ok"] is (code == 0)
        return code, said["checks"]

    return run


def test_a_fresh_machine_would_serve_and_hears_what_is_missing(examine: Any) -> None:
    code, found = examine("--devices", "cpu")
    assert code == 0
    assert set(found) == set(doctor.CHECKS)
    assert found["weights"]["state"] == "warning"
    assert "srpo weights pull flux/srpo" in found["weights"]["text"]
    assert "canaries" in found["safety"]["text"]


def test_a_database_and_a_bucket_that_servers_share_are_tried(postgres: Postgres, s3: S3Service) -> None:
    url, bucket = postgres.create_database(), s3.create_bucket()
    shared = {"database_url": url, "store_url": bucket, "store_endpoint": s3.endpoint}

    def examine(**changed: str) -> doctor.Finding:
        return doctor.check_storage(doctor.DoctorSettings.model_validate(shared | changed))

    found = examine()
    assert found.state == "ok"
    assert bucket in found.text
    assert url.rpartition("/")[2] in found.text
    advice = "make it, or correct SRPO_STORE_URL or SRPO_STORE_ENDPOINT"
    assert examine(store_url="s3://nowhere") == ("failed", f"s3://nowhere: there is no such bucket: {advice}")
    lost = examine(database_url=url.replace(str(postgres.port), str(free_port())))
    assert lost.state == "failed"
    assert PASSWORD not in f"{found} {lost}"


def test_what_would_not_work_fails(examine: Any, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, found = examine("--port", str(taken.getsockname()[1]), "--model", "flux/schnell")
    assert code == 1
    assert [name for name in ("port", "weights") if found[name]["state"] == "failed"] == ["port", "weights"]
    code, found = examine("--safety-checker", f"folder:{tmp_path / 'nowhere'}")
    assert (code, found["safety"]["state"]) == (1, "failed")
    (tmp_path / "keys").write_text("no hash\n")
    code, found = examine("--api-keys-file", str(tmp_path / "keys"))
    assert (code, found["keys"]["state"]) == (1, "failed")


def test_a_port_that_this_server_has_is_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    with Scripted(tmp_path / "data", safety_checker="none") as server:
        settings = {"port": server.port, "public_url": "https://your-host.example"}
        found = doctor.check_port(doctor.DoctorSettings.model_validate(settings))
    assert (found.state, found.text.partition(" is ")[2]) == ("ok", "this server's: it runs, and serves tiny")


def test_what_compiles_for_a_card_is_looked_for(examine: Any, driver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert examine("--devices", "cpu")[1]["compiler"]["state"] == "ok"
    driver("NVIDIA H200", 143771, 143000)
    monkeypatch.setenv("PATH", "/nowhere")
    found = examine()[1]["compiler"]
    assert found["state"] == "warning"
    assert "apt-get install g++ python3-dev" in found["text"]
    assert examine("--optimizations", "none")[1]["compiler"]["state"] == "ok"


def test_a_card_that_is_too_small_or_a_torch_without_cuda_fails(
    examine: Any, driver: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver("Small", 3072, 3000)
    tiny.build().save_pretrained(tmp_path / "models" / "FLUX.1-dev")
    monkeypatch.setattr(doctor, "read_torch_build", lambda: {"cuda": None})
    code, found = examine("--model", "flux/dev")
    assert code == 1
    assert "Small has 3." in found["placement"]["text"]
    assert (found["gpu"]["state"], "built for CPUs" in found["gpu"]["text"]) == ("failed", True)
    assert "no manifest" in found["weights"]["text"]


@pytest.mark.parametrize(
    ("built", "problem"),
    [
        ("13.0", "driver 580 or newer, or a torch that is built for CUDA 12"),
        ("12.6", None),
        ("12.9", None),  # a newer minor version runs on the driver of its major version
    ],
)
def test_a_driver_that_is_too_old_for_torch_fails(
    examine: Any, driver: Any, monkeypatch: pytest.MonkeyPatch, built: str, problem: str | None
) -> None:
    driver("NVIDIA H200", 143771, 143000)
    monkeypatch.setattr(doctor, "read_torch_build", lambda: {"cuda": built})
    found = examine()[1]["gpu"]
    assert found["state"] == ("failed" if problem else "ok")
    if problem:
        assert "driver 570.1 runs CUDA up to 12.8, but torch" in found["text"]
        assert found["text"].endswith(problem)


def test_a_torch_for_amd_cards_is_said_to_be_untried(examine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "read_torch_build", lambda: {"cuda": None, "hip": "6.4"})
    found = examine()[1]["gpu"]
    assert found["state"] == "warning"
    assert "for AMD cards (ROCm 6.4), which are untried: --devices cuda uses one" in found["text"]


def test_a_card_of_an_older_generation_fails(examine: Any, driver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    driver("Tesla T4", 16384, 16000).capability = [7, 5]
    monkeypatch.setattr(doctor, "read_torch_build", lambda: {"cuda": "12.8"})
    found = examine()[1]["gpu"]
    expected = "Tesla T4 has compute capability 7.5, and 8.0 or newer is needed: use another card, or --devices cpu"
    assert found == {"state": "failed", "text": expected}


@pytest.mark.parametrize("devices", ["cpu", "cpu,cpu", "cpu+cpu"])
def test_a_card_that_nobody_asks_for_is_in_nobodys_way(
    driver: Any, monkeypatch: pytest.MonkeyPatch, devices: str
) -> None:
    driver("Tesla K80", 12288, 100).capability = [3, 7]
    monkeypatch.setattr(doctor, "read_torch_build", lambda: {"cuda": None})
    settings = doctor.DoctorSettings.model_validate({"devices": devices, "model": "tiny"})
    assert doctor.check_gpu(settings) == ("ok", "not needed: the CPU draws, slowly")
    assert doctor.check_compiler(settings).state == "ok"
    assert doctor.check_placement(settings).text.startswith("on the CPU. ")
    assert doctor.check_gpu(doctor.DoctorSettings(devices=("cuda:0",))).state == "failed"


def test_an_old_small_card_beside_one_that_is_enough_is_a_warning(driver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = driver("NVIDIA H200", 143771, 143000)
    nvml.cards.append(("Quadro", 2048 * 2**20, 2000 * 2**20))
    monkeypatch.setattr(nvml, "nvmlDeviceGetCudaComputeCapability", lambda handle: [5, 0] if handle else [9, 0])
    monkeypatch.setattr(doctor, "read_torch_build", lambda: {"cuda": "12.8"})
    for devices, state in {"auto": "warning", "cuda:1": "warning", "cuda:0,cuda:1": "failed"}.items():
        settings = doctor.DoctorSettings.model_validate({"devices": devices, "model": "flux/dev"})
        gpu, placement = doctor.check_gpu(settings), doctor.check_placement(settings)
        assert (gpu.state, placement.state) == (state, "ok" if state == "warning" else state)
        assert "Quadro has compute capability 5.0" in gpu.text


def test_an_old_large_card_is_no_place_beside_a_small_one(driver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = driver("Quadro RTX 8000", 49152, 49000)
    nvml.cards.append(("a small one", 2048 * 2**20, 2000 * 2**20))
    monkeypatch.setattr(nvml, "nvmlDeviceGetCudaComputeCapability", lambda handle: [8, 6] if handle else [7, 5])
    assert doctor.check_placement(doctor.DoctorSettings(model="flux/dev")).state == "failed"


def test_the_doctor_reads_for_which_cuda_torch_is_built() -> None:
    build = doctor.read_torch_build()
    assert (build["cuda"], build.get("hip")) == (torch.version.cuda, torch.version.hip)


def test_a_smaller_card_gets_a_smaller_placement_which_can_be_overruled(
    examine: Any, driver: Any, tmp_path: Path
) -> None:
    driver("RTX", 24564, 24000, (7, 90 * 2**20))
    found = examine("--model", "flux/dev")[1]["placement"]
    assert found["state"] == "ok"
    assert "RTX: float8: " in found["text"]
    assert "21 GiB of its memory" in found["text"]
    assert "--placement chooses another" in found["text"]
    assert "offload: " in examine("--model", "flux/dev", "--placement", "offload")[1]["placement"]["text"]
    found = examine("--model", "flux/dev", "--placement", "resident")[1]["placement"]
    assert (found["state"], "float8, float8-offload, offload would fit" in found["text"]) == ("failed", True)


def test_the_screen_says_the_same_in_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--models-dir", str(tmp_path), "--data-dir", str(tmp_path), "--port", "0"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in doctor.CHECKS)
