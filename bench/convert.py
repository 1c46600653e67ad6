"""What `srpo weights inspect` and `convert` take at FLUX.1 [dev]'s real shapes: seconds, and peak memory.

The source is a sparse file of SRPO's 1,160 tensors in float32: 47.6 GB that take no room. What is written does: 23.8 GB
in bf16. `--layers 5 10` keeps 5 of the 19 double and 10 of the 38 single blocks, for a smaller disk; the largest
tensor, which bounds the memory, is the same.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from math import prod
from pathlib import Path

from weights.formats.architecture import TransformerConfig, tensor_shapes


def source(folder: Path, config: TransformerConfig) -> int:
    """Write a transformer's folder with a sparse file; returns the file's logical size in bytes."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(asdict(config)))
    path = folder / "diffusion_pytorch_model.safetensors"
    entries: dict[str, object] = {}
    offset = 0
    for name, shape in tensor_shapes(config).items():
        length = 4 * prod(shape)
        entries[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, offset + length]}
        offset += length
    header = json.dumps(entries).encode()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + offset)
    return path.stat().st_size


def run(*arguments: str) -> str:
    """Seconds and peak resident memory of one `srpo weights` command."""
    before = time.monotonic()
    subprocess.run([sys.executable, "-m", "server", "weights", *arguments], check=True, stdout=subprocess.DEVNULL)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024  # of the largest child so far
    return f"{time.monotonic() - before:.1f} s, at most {peak:.0f} MiB"


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure inspect and convert on a synthetic SRPO file.")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where there is room")
    parser.add_argument("--to", default="bf16", help="bf16, fp8 or q4")
    parser.add_argument("--layers", type=int, nargs=2, default=(19, 38), help="double and single blocks")
    options = parser.parse_args()
    config = TransformerConfig(num_layers=options.layers[0], num_single_layers=options.layers[1])
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        made, target = Path(folder) / "transformer", Path(folder) / "target"
        size = source(made, config)
        print(f"source: {size / 1e9:.1f} GB")
        print("inspect:", run("inspect", str(made)))
        print("convert:", run("convert", str(made), str(target), "--to", options.to))
        print(f"target: {target.stat().st_size / 1e9:.1f} GB")


if __name__ == "__main__":
    main()
