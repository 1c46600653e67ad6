"""The tiny transformer, and files of it in every format that people have."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import gguf
import torch
from safetensors.torch import save_file

from weights.formats.architecture import ARCHITECTURES, SWAPPED_HALVES, Shape, TransformerConfig, original_to_diffusers
from weights.formats.write import FP8_WRITER

TINY = next(known.config for known in ARCHITECTURES if known.title == "tiny")
Tensors = dict[str, torch.Tensor]


def original(tensors: Tensors, prefix: str = "", config: TransformerConfig = TINY) -> Tensors:
    """In the original FLUX keys."""
    found = {}
    for name, stack in original_to_diffusers(config).items():
        rows = torch.cat([tensors[part] for part in stack])
        if name.startswith(SWAPPED_HALVES):
            rows = torch.cat(rows.chunk(2)[::-1])
        found[prefix + name] = rows.contiguous()
    return found


def single(tensors: Tensors, path: Path) -> None:
    save_file(tensors, path)


def original_keys(tensors: Tensors, path: Path) -> None:
    save_file(original(tensors), path)


def comfyui(tensors: Tensors, path: Path) -> None:
    """A whole ComfyUI checkpoint: the transformer under its prefix, other models beside it."""
    beside = {"vae.decoder.conv_in.weight": torch.ones(2, 2), "text_encoders.clip_l.x.weight": torch.ones(3)}
    save_file(original(tensors, "model.diffusion_model.") | beside, path)


def comfyui_norms(tensors: Tensors, path: Path) -> None:
    """As newer ComfyUI saves the norms of queries and keys."""
    found = {name.replace("_norm.scale", "_norm.weight"): tensor for name, tensor in original(tensors).items()}
    save_file({f"model.diffusion_model.{name}": tensor for name, tensor in found.items()}, path)


def fp8(tensors: Tensors, path: Path) -> None:
    cast = {name: t.to(torch.float8_e4m3fn) if t.ndim == 2 else t.bfloat16() for name, t in tensors.items()}
    save_file(cast, path)


def fp8_scaled(tensors: Tensors, path: Path) -> None:
    """As ComfyUI writes them: one scale a matrix, in the original keys."""
    found: Tensors = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    for name, tensor in original(tensors).items():
        if tensor.ndim == 1:
            found[name] = tensor.bfloat16()
            continue
        scale = tensor.abs().max() / torch.finfo(torch.float8_e4m3fn).max
        found[name] = (tensor / scale).to(torch.float8_e4m3fn)
        found[name.replace(".weight", ".scale_weight")] = scale.reshape(1)
        found[name.replace(".weight", ".scale_input")] = torch.ones(1)
    save_file(found, path)


def fp8_rows(tensors: Tensors, path: Path) -> None:
    """As `srpo weights convert --to fp8` writes them."""
    listed = list(FP8_WRITER.list_tensors(TINY))
    FP8_WRITER.save(path, listed, (tensor.make(tensors.__getitem__) for tensor in listed), {})


def gguf_of(kind: gguf.GGMLQuantizationType) -> Callable[[Tensors, Path], None]:
    """In the original keys, as the community's GGUF files are: vectors stay float32."""

    def write(tensors: Tensors, path: Path) -> None:
        writer = gguf.GGUFWriter(path, "flux")
        for name, tensor in original(tensors).items():
            values = tensor.float().numpy()
            whole = tensor.ndim == 1
            chosen = gguf.GGMLQuantizationType.F32 if whole else kind
            writer.add_tensor(name, values if whole else gguf.quants.quantize(values, kind), raw_dtype=chosen)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    return write


def folder(tensors: Tensors, path: Path, shards: int = 3) -> None:
    """A transformer's folder, sharded."""
    from weights import tiny

    path.mkdir()
    config = {"_class_name": "FluxTransformer2DModel"} | tiny.TRANSFORMER
    (path / "config.json").write_text(json.dumps(config))
    names = sorted(tensors)
    where: dict[str, str] = {}
    for shard in range(shards):
        file = f"diffusion_pytorch_model-{shard + 1:05}-of-{shards:05}.safetensors"
        save_file({name: tensors[name] for name in names[shard::shards]}, path / file)
        where |= dict.fromkeys(names[shard::shards], file)
    index = {"metadata": {}, "weight_map": where}
    (path / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


WRITTEN: Mapping[str, tuple[str, Callable[[Tensors, Path], None], float]] = {
    # name of the case: the key of `FORMATS`, its writer, the largest error relative to a matrix's largest value
    "diffusers": ("diffusers", single, 0),
    "sharded folder": ("folder", folder, 0),
    "original": ("original", original_keys, 0),
    "comfyui": ("comfyui", comfyui, 0),
    "comfyui's norms": ("comfyui", comfyui_norms, 0),
    "fp8": ("fp8", fp8, 2**-4),
    "fp8 scaled": ("fp8-scaled", fp8_scaled, 2**-4),
    "fp8 rows": ("fp8-rows", fp8_rows, 2**-4),
    "gguf F16": ("gguf", gguf_of(gguf.GGMLQuantizationType.F16), 2**-11),
    "gguf BF16": ("gguf", gguf_of(gguf.GGMLQuantizationType.BF16), 2**-8),
    "gguf Q8_0": ("gguf", gguf_of(gguf.GGMLQuantizationType.Q8_0), 2**-7),
    "gguf Q4_0": ("gguf", gguf_of(gguf.GGMLQuantizationType.Q4_0), 2**-3),
}


def sparse_file(path: Path, shapes: Mapping[str, Shape], dtype: str, size: int) -> None:
    """A safetensors file of zeros that takes no room on the disk; `size` is the bytes of an element."""
    entries, offset = {}, 0
    for name, shape in shapes.items():
        length = torch.Size(shape).numel() * size
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + length]}
        offset += length
    header = json.dumps(entries).encode()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + offset)
