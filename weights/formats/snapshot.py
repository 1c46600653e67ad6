"""Is a diffusers folder whole, and does it ask for nothing but known classes? Reads headers only; no torch."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weights.errors import Refused, WrongWeights
from weights.formats.headers import read_header, refuse_foreign

PIPELINE = "FluxPipeline"
LIBRARIES = ("diffusers", "transformers")
COMPONENTS: Mapping[str, tuple[str, ...]] = {  # and a file of each that must be there
    "scheduler": ("scheduler_config.json",),
    "text_encoder": ("config.json",),
    "text_encoder_2": ("config.json",),
    "tokenizer": ("tokenizer_config.json",),
    "tokenizer_2": ("tokenizer_config.json",),
    "transformer": ("config.json",),
    "vae": ("config.json",),
}
WEIGHED = ("text_encoder", "text_encoder_2", "vae")  # the transformer may come from elsewhere


def check_snapshot(folder: Path) -> None:
    """Raises `WrongWeights` (which component is missing or damaged) or `Refused` (custom code, pickle)."""
    index = _read(folder / "model_index.json")
    if not isinstance(index.get("_class_name"), str):
        raise Refused(folder / "model_index.json", "it names a pipeline class of its own (custom code)")
    if index["_class_name"] != PIPELINE:
        raise WrongWeights(folder, f"it holds a {index['_class_name']}, expected a {PIPELINE}")
    for name, needed in COMPONENTS.items():
        entry = index.get(name)
        if not isinstance(entry, list) or len(entry) != 2 or entry[0] is None:
            raise WrongWeights(folder / "model_index.json", f"the component {name} is missing")
        if entry[0] not in LIBRARIES:
            raise Refused(folder / "model_index.json", f"{name} asks for code from {entry[0]!r} (custom code)")
        for file in needed:
            if not (folder / name / file).is_file():
                raise WrongWeights(folder / name, f"the component {name} is missing or incomplete: it has no {file}")
            if "auto_map" in _read(folder / name / file):
                raise Refused(folder / name / file, "it names classes of its own (`auto_map`: custom code)")
    for name in WEIGHED:
        check_component(folder / name)


def check_component(folder: Path) -> None:
    """The weights of one component: safetensors, each whole."""
    files = sorted(folder.glob("*.safetensors"))
    for index in sorted(folder.glob("*.safetensors.index.json")):
        named = _read(index).get("weight_map")
        absent = sorted(set(named.values()) - {file.name for file in files}) if isinstance(named, dict) else []
        if absent:
            raise WrongWeights(folder / absent[0], f"missing, though {index.name} names it")
    if not files:
        for suffix in ("*.bin", "*.pt", "*.ckpt"):
            for file in sorted(folder.glob(suffix)):
                refuse_foreign(file)
        raise WrongWeights(folder, "it holds no safetensors file")
    for file in files:
        read_header(file)


def _read(file: Path) -> Mapping[str, Any]:
    try:
        content: dict[str, Any] = dict(json.loads(file.read_text()))
        return content
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise WrongWeights(file, f"cannot be read ({error})") from error
