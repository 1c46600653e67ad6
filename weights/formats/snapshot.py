"""Checks that a diffusers folder is complete and names only classes of diffusers and transformers. No torch."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weights.errors import UnsafeFile, WrongWeights
from weights.formats.headers import read_header, reject_unsafe_file

PIPELINE = "FluxPipeline"
LIBRARIES = ("diffusers", "transformers")
REQUIRED_FILES: Mapping[str, tuple[str, ...]] = {  # by component
    "scheduler": ("scheduler_config.json",),
    "text_encoder": ("config.json",),
    "text_encoder_2": ("config.json",),
    "tokenizer": ("tokenizer_config.json",),
    "tokenizer_2": ("tokenizer_config.json",),
    "transformer": ("config.json",),
    "vae": ("config.json",),
}
COMPONENTS_WITH_WEIGHTS = ("text_encoder", "text_encoder_2", "vae")  # the transformer may come from elsewhere


def check_snapshot(folder: Path) -> None:
    """Raises `WrongWeights` for a component that is missing or damaged, `UnsafeFile` for custom code or pickle."""
    index = _read_json(folder / "model_index.json")
    if not isinstance(index.get("_class_name"), str):
        raise UnsafeFile(folder / "model_index.json", "it names a pipeline class of its own (custom code)")
    if index["_class_name"] != PIPELINE:
        raise WrongWeights(folder, f"it holds a {index['_class_name']}, expected a {PIPELINE}")
    for name, needed in REQUIRED_FILES.items():
        entry = index.get(name)
        if not isinstance(entry, list) or len(entry) != 2 or entry[0] is None:
            raise WrongWeights(folder / "model_index.json", f"the component {name} is missing")
        if entry[0] not in LIBRARIES:
            raise UnsafeFile(folder / "model_index.json", f"{name} asks for code from {entry[0]!r} (custom code)")
        for file in needed:
            if not (folder / name / file).is_file():
                raise WrongWeights(folder / name, f"the component {name} is missing or incomplete: it has no {file}")
            if "auto_map" in _read_json(folder / name / file):
                raise UnsafeFile(folder / name / file, "it names classes of its own (`auto_map`: custom code)")
    for name in COMPONENTS_WITH_WEIGHTS:
        check_component(folder / name)


def check_component(folder: Path) -> None:
    """Check the safetensors files of one component. Raises as `check_snapshot` does."""
    files = sorted(folder.glob("*.safetensors"))
    for index in sorted(folder.glob("*.safetensors.index.json")):
        weight_map = _read_json(index).get("weight_map")
        shards = set(weight_map.values()) if isinstance(weight_map, dict) else set()
        missing = sorted(shards - {file.name for file in files})
        if missing:
            raise WrongWeights(folder / missing[0], f"missing, though {index.name} names it")
    if not files:
        for suffix in ("*.bin", "*.pt", "*.ckpt"):
            for file in sorted(folder.glob(suffix)):
                reject_unsafe_file(file)
        raise WrongWeights(folder, "it holds no safetensors file")
    for file in files:
        read_header(file)


def _read_json(file: Path) -> Mapping[str, Any]:
    try:
        content: dict[str, Any] = dict(json.loads(file.read_text()))
        return content
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise WrongWeights(file, f"cannot be read ({error})") from error
