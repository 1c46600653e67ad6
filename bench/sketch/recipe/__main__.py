"""python -m bench.sketch.recipe STAGE --out DIR --minutes M [--device cuda] [--seed S] [--smoke]
                                  [--start-from MODEL]

Stages, in order; each resumes from its checkpoint in DIR: `codec` (principal components), `decoder`, `flow`,
`guidance` (distillation). `export` then writes the model's files to DIR/model.
"""

import argparse
from pathlib import Path

import torch

from bench.sketch.recipe import codec, flow, vae
from bench.sketch.recipe.atlas import Atlas, fetch
from bench.sketch.recipe.data import LATER
from bench.sketch.recipe.export import export
from bench.sketch.recipe.warmstart import start_from

SMOKE_STEPS = 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["codec", "decoder", "flow", "guidance", "export"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=30.0, help="of training in all, earlier runs counted in")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--start-from", type=Path, help="flow: begin with these weights; export: with this decoder")
    parser.add_argument("--smoke", action="store_true", help=f"{SMOKE_STEPS} small steps, to see that the stage runs")
    arguments = parser.parse_args()
    out, seed, limit = arguments.out, arguments.seed, SMOKE_STEPS if arguments.smoke else None
    atlas = Atlas(fetch(out))
    if arguments.stage == "codec":
        codec.fit(atlas, 8 if arguments.smoke else 400, seed).save(out / "codec.safetensors")
        return
    code = codec.Codec.load(out / "codec.safetensors")
    if arguments.stage == "export":
        export(out, out / "model", atlas, code, seed, arguments.start_from)
        return
    if arguments.stage == "flow":
        earlier = arguments.start_from
        prepare = None if earlier is None else lambda painter: start_from(painter, earlier, LATER, atlas)
        flow.train(out, atlas, code, arguments.minutes, seed, arguments.device, limit=limit, prepare=prepare)
        return
    stage = {"decoder": vae.train_decoder, "guidance": flow.distil}[arguments.stage]
    stage(out, atlas, code, arguments.minutes, seed, arguments.device, limit=limit)


if __name__ == "__main__":
    main()
