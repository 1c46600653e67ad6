"""python -m bench.sketch.recipe STAGE --out DIR --minutes M [--device cuda] [--seed S] [--smoke]
                                  [--start-from MODEL]

Stages, in order; each resumes from its checkpoint in DIR: `codec` (principal components), `decoder`, `alphabet` (what
T5's rows have in common), `text` (T5 learns to spell), `flow`. `export` then writes the model's files to DIR/model.
With `--start-from`, an earlier edition's folder, `codec` and `alphabet` are that edition's, its autoencoder and T5 are
kept (no `decoder`, no `text`), and `flow` begins with its transformer.
"""

import argparse
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from bench.sketch.recipe import codec, flow, text, vae
from bench.sketch.recipe.atlas import Atlas, fetch
from bench.sketch.recipe.concepts import CONCEPTS
from bench.sketch.recipe.export import export
from bench.sketch.recipe.pieces import Alphabet, Pieces

SMOKE_STEPS = 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["codec", "decoder", "alphabet", "text", "flow", "export"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=30.0, help="of training in all, earlier runs counted in")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--start-from", type=Path, help="the folder of an earlier edition")
    parser.add_argument("--smoke", action="store_true", help=f"{SMOKE_STEPS} small steps, to see that the stage runs")
    arguments = parser.parse_args()
    out, seed, limit = arguments.out, arguments.seed, SMOKE_STEPS if arguments.smoke else None
    minutes, device, earlier = arguments.minutes, arguments.device, arguments.start_from
    atlas = Atlas(fetch(out))
    if arguments.stage == "codec" and earlier is not None:
        codec.Codec.of(AutoencoderKL.from_pretrained(earlier / "vae", local_files_only=True)).save(
            out / "codec.safetensors"
        )
        return
    if arguments.stage == "codec":
        codec.fit(atlas, 8 if arguments.smoke else 400, seed).save(out / "codec.safetensors")
        return
    code = codec.Codec.load(out / "codec.safetensors")
    stamps = codec.Stamps(atlas, code)
    if arguments.stage == "decoder":
        vae.train_decoder(out, atlas, code, minutes, seed, device, limit=limit)
        return
    if arguments.stage == "alphabet":
        made = Alphabet.fit(stamps, CONCEPTS, seed) if earlier is None else Alphabet.of(earlier, stamps, CONCEPTS)
        made.save(out / "alphabet.safetensors")
        return
    alphabet = Alphabet.load(out / "alphabet.safetensors")
    pieces = Pieces(stamps, alphabet, CONCEPTS)
    if arguments.stage == "text":
        text.train_text(out, pieces, alphabet, minutes, seed, limit)
        return
    t5 = text.load_t5(out / "text.ckpt", pieces.table) if earlier is None else text.read_t5(earlier, pieces.table)
    if arguments.stage == "flow":
        flow.train(out, stamps, pieces, alphabet, t5.to(device), minutes, seed, device, limit=limit, earlier=earlier)
    else:
        export(out, out / "model", atlas, code, pieces, t5, seed, earlier)


if __name__ == "__main__":
    main()
