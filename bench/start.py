"""How long a model takes to load, and how much of the host's memory it needs, compared with the size of its files.

    srpo bench start [--layers 19 38] [--t5-layers 24] [--device auto|meta] [--placement auto] [--json FILE]

A folder with FLUX.1 [dev]'s own widths and the given number of blocks is written as sparse files (zeros that take no
space on the disk). A separate process loads it as a worker does, without the self-check. The seconds therefore do not
include reading from a disk: the transformer's bytes a second are those of the page cache. The peak includes pages of
mapped files; the memory that stays is given separately. `--device meta` receives every tensor and stores none, which
shows the host's own share while a card is filled.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from bench.support.geometry import CLIP, CLIP_TOKENS, T5, TEXT_TOKENS, TRANSFORMER, VAE
from bench.support.memory import MIB, read_memory
from bench.support.report import make_parser, print_table, write_json
from bench.support.sparse_weights import write_sparse
from pipelines.engine.base import EngineConfig, Report
from pipelines.loading.build import choose_dtype, load_one
from weights import tiny
from weights.checkpoints import CHECKPOINTS, locate_files
from weights.load import load_pipeline

GB = 10**9
META = torch.device("meta")
WEIGHTS = {"transformer": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}  # the others: model


def write_model(folder: Path, layers: tuple[int, int], t5_layers: int) -> int:
    """Write FLUX.1 [dev]'s folder in diffusers layout, with sparse weights; returns their bytes."""
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
        shapes = {
            key: tensor.shape for key, tensor in part.state_dict().items() if key != "encoder.embed_tokens.weight"
        }
        size += write_sparse(folder / name / f"{WEIGHTS.get(name, 'model')}.safetensors", shapes, "BF16", 2)
    return size


def load(config: EngineConfig) -> dict[str, Any]:
    """Load in this process; returns seconds, and memory in bytes."""
    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.disable_progress_bar()
    stages: list[tuple[str, float]] = []
    before, start, used = read_memory("VmHWM"), time.perf_counter(), time.process_time()
    placement = "nowhere: only read"
    if config.device == "meta":
        located = locate_files(CHECKPOINTS[config.model], Path(config.models_dir))
        load_pipeline(located, choose_dtype(config.dtype, META), META, record_stages(stages))
    else:
        placement = load_one(config, record_stages(stages)).info.placement
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
        "peak": read_memory("VmHWM"),  # not ru_maxrss, which begins with what the parent had
        "kept": read_memory("RssAnon"),
        "card": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
    }


def load_elsewhere(config: EngineConfig) -> dict[str, Any]:
    """Load in a process of its own; what `load` returns."""
    command = [sys.executable, "-m", "server", "bench", "start", "--load", json.dumps(config.to_json())]
    process = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    figures: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return figures


def record_stages(stages: list[tuple[str, float]]) -> Report:
    """A report that records when each stage begins."""
    return lambda stage, _: stages.append((stage, time.perf_counter()))


def main(arguments: list[str]) -> int:
    parser = make_parser("start", __doc__)
    parser.add_argument("--layers", type=int, nargs=2, default=(3, 6), help="double and single blocks; FLUX.1: 19 38")
    parser.add_argument("--t5-layers", type=int, default=8, help="of the text encoder; FLUX.1: 24")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--placement", default="auto")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="a disk with sparse files")
    parser.add_argument("--load", help=argparse.SUPPRESS)  # the configuration, for the separate process
    options = parser.parse_args(arguments)
    if options.load:
        print(json.dumps(load(EngineConfig(**json.loads(options.load)))))
        return 0
    with tempfile.TemporaryDirectory(dir=options.folder) as models:
        folder = Path(models) / "FLUX.1-dev"
        size = write_model(folder, tuple(options.layers), options.t5_layers)
        transformer = sum(file.stat().st_size for file in (folder / "transformer").glob("*.safetensors"))
        config = EngineConfig("flux/dev", models, options.device, options.dtype, placement=options.placement)
        figures = {"files": size, "transformer": transformer, **load_elsewhere(config)}
    show(figures)
    write_json(figures, options.json)
    return 0


def show(figures: Mapping[str, Any]) -> None:
    rows = [
        ("files", f"{figures['files'] / MIB:,.0f} MiB"),
        ("loaded in", f"{figures['seconds']:.1f} s, {figures['cpu_seconds']:.1f} s of a core's time"),
    ]
    rows += [(f"  {stage.partition(' (')[0]}", f"{seconds:.1f} s") for stage, seconds in figures["stages"].items()]
    if took := figures["stages"].get("loading the transformer"):
        rows.append(("  the transformer's bytes a second", f"{figures['transformer'] / took / GB:.2f} GB/s"))
    over = (figures["peak"] - figures["before"]) / figures["files"]
    rows += [
        ("host's memory, peak", f"{figures['peak'] / MIB:,.0f} MiB ({over:.2f} of the files, beyond imports)"),
        ("host's memory, kept", f"{figures['kept'] / MIB:,.0f} MiB"),
        ("host's memory, imports", f"{figures['before'] / MIB:,.0f} MiB"),
    ]
    if figures["card"]:
        rows.append(("the card's memory, peak", f"{figures['card'] / MIB:,.0f} MiB"))
    print_table(figures["placement"], ("what", "figure"), rows)
