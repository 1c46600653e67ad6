"""Seconds and peak memory of `srpo weights inspect` and `convert` at FLUX.1 [dev]'s real shapes.

    srpo bench convert [--to bf16] [--layers 19 38] [--folder DIR] [--json FILE]

The source is a sparse file of SRPO's 1,160 tensors in float32: 47.6 GB that take no space on the disk. The target does:
23.8 GB in bf16. For a smaller disk, `--layers 5 10` keeps 5 of the 19 double and 10 of the 38 single blocks; the
largest tensor, which bounds the memory, is the same.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from bench.support.report import make_parser, print_table, write_json
from bench.support.sparse_weights import write_sparse
from weights.formats.architecture import TransformerConfig, tensor_shapes


def write_source(folder: Path, config: TransformerConfig) -> int:
    """Write a transformer's folder with a sparse file; returns the file's logical size in bytes."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(asdict(config)))
    return write_sparse(folder / "diffusion_pytorch_model.safetensors", tensor_shapes(config), "F32", 4)


def run_command(*arguments: str) -> dict[str, float]:
    """Run one `srpo weights` command: its seconds, and the peak of resident memory in MiB of the commands so far."""
    start = time.monotonic()
    subprocess.run([sys.executable, "-m", "server", "weights", *arguments], check=True, stdout=subprocess.DEVNULL)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    return {"seconds": time.monotonic() - start, "peak_mib": peak}


def main(arguments: list[str]) -> int:
    parser = make_parser("convert", __doc__)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where there is space")
    parser.add_argument("--to", default="bf16", help="bf16, fp8 or q4")
    parser.add_argument("--layers", type=int, nargs=2, default=(19, 38), help="double and single blocks")
    options = parser.parse_args(arguments)
    config = TransformerConfig(num_layers=options.layers[0], num_single_layers=options.layers[1])
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        source, target = Path(folder) / "transformer", Path(folder) / "target"
        source_bytes = write_source(source, config)
        commands = {
            "inspect": run_command("inspect", str(source)),
            "convert": run_command("convert", str(source), str(target), "--to", options.to),
        }
        target_bytes = target.stat().st_size
    title = f"{source_bytes / 1e9:.1f} GB to {target_bytes / 1e9:.1f} GB"
    rows = [(name, f"{row['seconds']:.1f}", f"{row['peak_mib']:.0f}") for name, row in commands.items()]
    print_table(title, ("command", "seconds", "at most MiB"), rows)
    write_json({"source_bytes": source_bytes, "target_bytes": target_bytes, **commands}, options.json)
    return 0
