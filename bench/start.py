"""How long a model takes to load, and how much of the host's memory, beside the size of its files.

    srpo bench start [--layers 19 38] [--t5-layers 24] [--device auto|meta] [--placement auto] [--json FILE]

A folder of FLUX.1 [dev]'s own widths is written as sparse files (zeros that take no room on the disk), with as many
blocks as asked for, and loaded by a process of its own as a worker does it, but for the self-check. Seconds so leave
out what a disk takes. The peak counts pages of mapped files too; the memory that stays is told apart from it.
`--device meta` takes every tensor and keeps none: what is left is the host's own share while a card is filled.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from rich.console import Console
from rich.table import Table
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from bench.geometry import CLIP, CLIP_TOKENS, T5, TEXT_TOKENS, TRANSFORMER, VAE
from pipelines.engine.base import EngineConfig, Report
from pipelines.loading.build import choose_dtype, load_one
from weights import tiny
from weights.checkpoints import CHECKPOINTS, locate_files
from weights.load import load_pipeline

MIB = 2**20
META = torch.device("meta")
WEIGHTS = {"transformer": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}  # the others: model


def sparse(path: Path, tensors: Mapping[str, torch.Tensor]) -> int:
    """A safetensors file of zeros in bfloat16. Returns its logical size in bytes."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        length = 2 * prod(tensor.shape)
        entries[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [offset, offset + length]}
        offset += length
    header = json.dumps(entries).encode()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + offset)
    return path.stat().st_size


def folder_of(folder: Path, layers: tuple[int, int], t5_layers: int) -> int:
    """FLUX.1-dev's folder in diffusers layout. Returns the bytes of its weights."""
    with torch.device("meta"):
        parts: dict[str, Any] = {
            "transformer": FluxTransformer2DModel(**TRANSFORMER, num_layers=layers[0], num_single_layers=layers[1]),
            "vae": AutoencoderKL(**(VAE | {"mid_block_add_attention": True})),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**CLIP)),
            "text_encoder_2": T5EncoderModel(T5Config(**(T5 | {"num_layers": t5_layers}))),
        }
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**tiny.SCHEDULER),
        tokenizer=tiny.byte_tokenizer("<|startoftext|>", "<|endoftext|>", "<pad>", CLIP_TOKENS),
        tokenizer_2=tiny.byte_tokenizer(None, "</s>", "<pad>", TEXT_TOKENS),
        **parts,
    )
    pipeline.save_config(folder)
    for name in ("scheduler", "tokenizer", "tokenizer_2"):
        getattr(pipeline, name).save_pretrained(folder / name)
    size = 0
    for name, part in parts.items():
        (folder / name).mkdir()
        save = part.config.save_pretrained if name.startswith("text") else part.save_config
        save(folder / name)
        tensors = {key: tensor for key, tensor in part.state_dict().items() if key != "encoder.embed_tokens.weight"}
        size += sparse(folder / name / f"{WEIGHTS.get(name, 'model')}.safetensors", tensors)
    return size


def load(config: EngineConfig) -> dict[str, Any]:
    """Load in this process, and say what that took. Bytes and seconds."""
    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.disable_progress_bar()
    stages: list[tuple[str, float]] = []
    before, start, used = resident("VmHWM"), time.perf_counter(), time.process_time()
    placement = "nowhere: only read"
    if config.device == "meta":
        located = locate_files(CHECKPOINTS[config.model], Path(config.models_dir))
        load_pipeline(located, choose_dtype(config.dtype, META), META, noted(stages))
    else:
        placement = load_one(config, noted(stages)).info.placement
    end = time.perf_counter()
    seconds: dict[str, float] = {}
    for (stage, begun), (_, ended) in zip(stages, [*stages[1:], ("", end)], strict=True):
        seconds[stage] = seconds.get(stage, 0.0) + ended - begun
    return {
        "placement": placement,
        "seconds": end - start,
        "cpu_seconds": time.process_time() - used,
        "stages": seconds,
        "before": before,
        "peak": resident("VmHWM"),  # not ru_maxrss, which begins with what the parent had
        "kept": resident("RssAnon"),
        "card": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
    }


def noted(stages: list[tuple[str, float]]) -> Report:
    """Writes down when each stage began."""
    return lambda stage, _: stages.append((stage, time.perf_counter()))


def resident(name: str) -> int:
    """Bytes of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="srpo bench start", description="Measure how a large model is loaded.")
    parser.add_argument("--layers", type=int, nargs=2, default=(3, 6), help="double and single blocks; FLUX.1: 19 38")
    parser.add_argument("--t5-layers", type=int, default=8, help="of the text encoder; FLUX.1: 24")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--placement", default="auto")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="a disk with sparse files")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--load", help=argparse.SUPPRESS)  # what the process of its own is told
    options = parser.parse_args(arguments)
    if options.load:
        print(json.dumps(load(EngineConfig(**json.loads(options.load)))))
        return 0
    with tempfile.TemporaryDirectory(dir=options.folder) as models:
        size = folder_of(Path(models) / "FLUX.1-dev", tuple(options.layers), options.t5_layers)
        config = EngineConfig("flux/dev", models, options.device, options.dtype, placement=options.placement)
        command = [sys.executable, "-m", "server", "bench", "start", "--load", json.dumps(config.to_json())]
        ended = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    figures = {"files": size, **json.loads(ended.stdout.splitlines()[-1])}
    show(figures)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


def show(figures: Mapping[str, Any]) -> None:
    table = Table("what", "figure", title=figures["placement"])
    table.add_row("files", f"{figures['files'] / MIB:,.0f} MiB")
    table.add_row("loaded in", f"{figures['seconds']:.1f} s, {figures['cpu_seconds']:.1f} s of a core's time")
    for stage, seconds in figures["stages"].items():
        table.add_row(f"  {stage.partition(' (')[0]}", f"{seconds:.1f} s")
    over = (figures["peak"] - figures["before"]) / figures["files"]
    table.add_row("host's memory, peak", f"{figures['peak'] / MIB:,.0f} MiB ({over:.2f} of the files, beyond imports)")
    table.add_row("host's memory, kept", f"{figures['kept'] / MIB:,.0f} MiB")
    table.add_row("host's memory, imports", f"{figures['before'] / MIB:,.0f} MiB")
    if figures["card"]:
        table.add_row("the card's memory, peak", f"{figures['card'] / MIB:,.0f} MiB")
    Console().print(table)
