"""What the loopback hub publishes: the tiny model's files under the real models' names."""

from pathlib import Path

from weights import tiny
from weights.checkpoints import CHECKPOINTS, SAFETY, SRPO

DEV = CHECKPOINTS["flux/srpo"].repositories[0]
SRPO_FILE = "diffusion_pytorch_model.safetensors"
BIG = b"\x01" * 300_000


def publish(folder: Path) -> dict[str, dict[str, bytes]]:
    """Each repository's files: those of FLUX.1-dev and SRPO, with what serving does not need beside it; `folder` is for
    the work."""
    pipeline = tiny.build()
    pipeline.save_pretrained(folder)
    for file in (folder / "text_encoder_2").glob("*.safetensors*"):
        file.unlink()
    pipeline.text_encoder_2.save_pretrained(folder / "text_encoder_2", max_shard_size="20KB")
    (transformer,) = (folder / "transformer").glob("*.safetensors")
    srpo = transformer.read_bytes()
    dev = {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    useless = ("flux1-dev.safetensors", "ae.safetensors", "dev_grid.jpg", "text_encoder/pytorch_model.bin", "README.md")
    dev |= dict.fromkeys(useless, BIG) | {"LICENSE.md": b"a licence"}
    assert any(path.startswith("text_encoder_2/model-00002-of-") for path in dev)
    safety = {"config.json": b"{}", "preprocessor_config.json": b"{ }", "model.safetensors": b"s" * 99, "a.bin": BIG}
    return {DEV.name: dev, SRPO.name: {SRPO_FILE: srpo, "SRPO_lora.safetensors": BIG}, SAFETY.name: safety}
