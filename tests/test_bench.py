"""The measurements run small on a CPU, and their output can be read by people and by programs."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from support.compilers import torch_as_it_was

from bench.optimizations import list_contenders
from bench.quality import psnr, ssim
from bench.support.geometry import MODELS, step_flops
from pipelines.acceleration import PRESETS
from pipelines.fields import Size
from pipelines.optimize.optimizations import OPTIMIZATIONS
from pipelines.safety.open_nsfw import canaries
from server.cli.bench import main


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.*progress")
def test_bench_engine_measures_every_preset_beside_the_stock_pipeline(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    file = tmp_path / "figures.json"
    small = ["--model", "tiny", "--device", "cpu", "--dtype", "float32", "--sizes", "512x512", "--steps", "12"]
    assert main(["engine", *small, "--repeats", "1", "--requests", "4", "--json", str(file)]) == 0
    figures = json.loads(file.read_text())
    rows = {row["name"]: row for row in figures["rows"]}
    assert set(rows) == {"FluxPipeline eager", *(f"srpo {preset}" for preset in PRESETS)}
    assert [rows[f"srpo {preset}"]["computed_steps"] for preset in PRESETS] == [12, 9, 8]
    assert all(row["p95_s"] >= row["median_s"] > 0 and row["of_ceiling"] > 0 for row in rows.values())
    assert rows["FluxPipeline eager"]["speed_up"] == 1
    assert all(seconds > 0 for seconds in figures["stages"]["512x512"].values())
    assert set(figures["mixed_load"]) == {
        f"{shape}_{order}" for shape in ("burst", "poisson") for order in ("scheduler", "first_come")
    }
    labels = ("1 together", "2 together", "4 together", "decode")
    assert list(figures["batches"]) == [f"512x512, {label}" for label in labels]
    assert all(row["s_per_image"] > 0 and 0 < row["peak_gib"] < 64 for row in figures["batches"].values())
    printed = capsys.readouterr().out
    assert all(name in printed for name in [*rows, "skipped_step", "poisson_scheduler"])


FEW = [
    list_contenders()[0],
    *list_contenders()[2:4],
    *(row for row in list_contenders() if row.name in ("modulation", "all, high")),
]


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.*progress")
def test_bench_optimizations_measures_each_alone_and_goes_on_where_it_was_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    file = tmp_path / "optimizations.json"
    small = ["--model", "tiny", "--device", "cpu", "--dtype", "float32", "--sizes", "512x512", "--steps", "9"]
    command = ["optimizations", *small, "--repeats", "1", "--compiler", "eager", "--json", str(file)]
    monkeypatch.setattr("bench.optimizations.list_contenders", lambda: FEW)
    monkeypatch.setattr("pipelines.optimize.compile.SIZES", (Size(512, 512),))
    assert main(command) == 0
    figures = json.loads(file.read_text())
    rows = {row["name"]: row for row in figures["rows"]}
    assert list(rows) == [contender.name for contender in FEW]
    assert rows["FluxPipeline eager"]["speed_up"] == 1
    drawn = [row for row in rows.values() if "error" not in row]
    assert all(row["p95_s"] >= row["median_s"] > 0 < row["of_ceiling"] for row in drawn)
    assert rows["no optimization"]["step_s"] > 0 < rows["no optimization"]["rest_s"]
    assert rows["all, high"].get("skipped_step_s", 1) > 0  # without torchao the row says why it is missing
    capsys.readouterr()
    figures["rows"] = [row for row in figures["rows"] if row["name"] != "texts"]
    file.write_text(json.dumps(figures))
    assert main(command) == 0
    again = json.loads(file.read_text())
    assert again["rows"][:-1] == figures["rows"]
    assert again["rows"][-1]["name"] == "texts"
    printed = capsys.readouterr().out
    assert all(name in printed for name in rows)
    with pytest.raises(SystemExit):
        main([*command, "--steps", "8"])
    assert "give another file" in capsys.readouterr().err


def test_every_optimization_has_a_row_of_its_own() -> None:
    alone = [
        row.optimizations for row in list_contenders() if row.optimizations is not None and len(row.optimizations) == 1
    ]
    assert alone == [(name,) for name in OPTIMIZATIONS]


def test_the_full_geometry_is_flux_1_devs() -> None:
    """Parameters counted by the vendor: 11.9 billion in the transformer; operations a step counted by torch."""
    pipeline = MODELS["flux"](torch.bfloat16, torch.device("meta")).pipeline

    def billions(part: torch.nn.Module) -> float:
        return sum(tensor.numel() for tensor in part.parameters()) / 1e9

    assert billions(pipeline.transformer) == pytest.approx(11.90, abs=0.01)
    assert billions(pipeline.text_encoder_2) == pytest.approx(4.76, abs=0.01)
    assert billions(pipeline.text_encoder) == pytest.approx(0.123, abs=0.001)
    assert billions(pipeline.vae) == pytest.approx(0.0838, abs=0.001)
    assert step_flops(pipeline.transformer.config, 512, 1440, 512) == pytest.approx(51.9e12, rel=0.005)
    assert step_flops(pipeline.transformer.config, 512, 1024, 1024) == pytest.approx(74.4e12, rel=0.005)


def test_bench_safety_names_what_would_be_withheld(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, picture in zip(("bad.png", "good.png"), canaries(), strict=True):
        picture.save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    file = tmp_path / "figures.json"
    assert main(["safety", str(tmp_path), "--json", str(file)]) == 0
    assert "flagged at 0.1: 1, 0.2: 1, 0.5: 1, 0.8: 1, 0.85: 1" in capsys.readouterr().out
    figures = json.loads(file.read_text())
    assert list(figures["scores"]) == ["bad.png", "good.png"]
    assert figures["ms"] > 0


def test_bench_previews_says_their_share_of_an_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "figures.json"
    small = ["--device", "cpu", "--size", "512x512", "--steps", "8", "--images", "1"]
    assert main(["previews", *small, "--json", str(file)]) == 0
    figures = json.loads(file.read_text())
    assert set(figures) == {"blurred", "sharp"}
    for row in figures.values():
        assert row["share"] == pytest.approx(3 * row["preview_ms"] / row["image_ms"])
        assert row["preview_ms"] > 0.01  # something was drawn
    assert "sharp" in capsys.readouterr().out


@pytest.mark.long
def test_bench_readers_measures_those_who_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "figures.json"
    assert main(["readers", "--rounds", "1", "--read", "2", "--hang", "1", "--leave", "1", "--json", str(file)]) == 0
    figures = json.loads(file.read_text())
    assert all(value > 0 for value in figures.values())
    assert "memory_after_round_1_mib" in capsys.readouterr().out


@pytest.mark.long
def test_bench_start_shows_that_files_are_never_in_memory_as_a_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """FLUX.1 [dev]'s own widths, few blocks. A device that takes everything leaves the host's own share."""
    file = tmp_path / "figures.json"
    few = ["--layers", "1", "1", "--t5-layers", "1", "--folder", str(tmp_path)]
    assert main(["start", *few, "--device", "meta", "--json", str(file)]) == 0
    figures = json.loads(file.read_text())
    assert figures["files"] > 2e9
    assert figures["peak"] - figures["before"] < 0.5 * figures["files"]
    assert figures["stages"]["loading the transformer"] > 0
    assert "host's memory, peak" in capsys.readouterr().out


@pytest.mark.long
def test_bench_host_measures_python_without_kernels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "figures.json"
    with torch_as_it_was():
        assert main(["host", "--steps", "3", "--layers", "1", "1", "--json", str(file)]) == 0
    figures = json.loads(file.read_text())
    assert set(figures) == {"ours", "compiled"}
    assert all(value > 0 for value in figures.values())
    assert "compiled" in capsys.readouterr().out


@pytest.mark.long
def test_bench_convert_measures_both_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "figures.json"
    assert main(["convert", "--layers", "0", "0", "--folder", str(tmp_path), "--json", str(file)]) == 0
    figures = json.loads(file.read_text())
    assert figures["source_bytes"] == pytest.approx(2 * figures["target_bytes"], rel=0.01)  # float32 to bfloat16
    assert set(figures["inspect"]) == set(figures["convert"]) == {"seconds", "peak_mib"}
    assert "at most MiB" in capsys.readouterr().out


def test_an_unknown_bench_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["warp"]) == 2
    assert main([]) == 0
    assert "engine" in capsys.readouterr().out


@pytest.mark.long
def test_bench_quality_says_how_far_each_preset_drifts(tmp_path: Path) -> None:
    figures, sheet = tmp_path / "drift.json", tmp_path / "sheet.png"
    small = ["--model", "tiny", "--device", "cpu", "--dtype", "float32", "--size", "512x512", "--steps", "2,12"]
    assert main(["quality", *small, "--images", "2", "--sheet", str(sheet), "--json", str(figures)]) == 0
    few, rows = (json.loads(figures.read_text())[steps] for steps in ("2", "12"))
    assert few["regular"]["psnr_worst"] == few["high"]["psnr_worst"] == float("inf")  # where nothing is skipped
    assert set(rows) == {"regular", "high", "other seed"}
    assert [rows[preset]["computed_steps"] for preset in rows] == [9, 8, 12]
    for preset in ("regular", "high"):
        assert rows["other seed"]["psnr_mean"] < rows[preset]["psnr_worst"] < 100
        assert rows["other seed"]["ssim_mean"] < rows[preset]["ssim_worst"] < 1
    with Image.open(sheet) as page:
        assert page.width > 3 * 256
        assert page.height > 2 * 256


def test_the_measures_of_likeness() -> None:
    chance = torch.Generator().manual_seed(2)
    picture = torch.randint(0, 255, (64, 48, 3), generator=chance, dtype=torch.uint8)
    assert psnr(picture + 1, picture) == pytest.approx(48.13, abs=0.01)  # 20 log10(255)
    assert ssim(picture, picture) == pytest.approx(1.0)
    noise = torch.randint(0, 255, picture.shape, generator=chance, dtype=torch.uint8)
    assert ssim(noise, picture) < 0.2
