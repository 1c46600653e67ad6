"""LoRA files as programs write them: what each changes is what its keys say, and none is merged in part."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline
from safetensors.torch import save_file
from support.engines import engine_with
from support.written_formats import TINY, Tensors, original

from weights.errors import WrongWeights
from weights.formats import lora
from weights.formats.architecture import tensor_shapes
from weights.formats.inspection import inspect

RANK, ALPHA = 4, 8.0
SHAPES = tensor_shapes(TINY)
PEFT, KOHYA = ("lora_A", "lora_B"), ("lora_down", "lora_up")
CLIP = "text_model.encoder.layers.0.self_attn.q_proj"
BLOCK = "transformer_blocks.0.attn.to_q"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(3)


def pair(stem: str, words: tuple[str, str], rows: int = 32, columns: int = 32, alpha: float | None = None) -> Tensors:
    """The tensors of one layer."""
    down, up = torch.randn(RANK, columns) * 0.1, torch.randn(rows, RANK) * 0.1
    file = {f"{stem}.{words[0]}.weight": down, f"{stem}.{words[1]}.weight": up}
    return file if alpha is None else file | {f"{stem}.alpha": torch.tensor(alpha)}


def product(file: Tensors, stem: str, words: tuple[str, str]) -> torch.Tensor:
    return file[f"{stem}.{words[1]}.weight"] @ file[f"{stem}.{words[0]}.weight"]


def read(path: Path, file: Tensors) -> lora.Lora:
    save_file(file, path / "lora")
    return lora.read(path / "lora", 1.0, SHAPES)


def changes(found: lora.Lora) -> Tensors:
    """What a LoRA adds to each weight."""
    every = {**found.transformer, **found.text_encoder}
    return {name: delta.factor * delta.up @ delta.down for name, delta in every.items()}


REFUSED = {
    "LyCORIS": (
        pair("lycoris_double_blocks_0_img_attn_proj", KOHYA, alpha=ALPHA),
        "lycoris_double_blocks_0_img_attn_proj.lora_up.weight, which diffusers' converter does not understand",
    ),
    "original keys without a prefix": (
        pair("double_blocks.0.img_attn.proj", KOHYA),
        "double_blocks.0.img_attn.proj.lora_up.weight, which diffusers' converter",
    ),
    "ComfyUI's prefix of checkpoints": (
        pair("model.diffusion_model.double_blocks.0.img_attn.proj", KOHYA),
        "model.diffusion_model.double_blocks.0.img_attn.proj.lora_up.weight, which diffusers' converter",
    ),
    "one unknown layer among known ones": (
        pair("diffusion_model.double_blocks.0.img_attn.proj", KOHYA) | pair("model.img_in", KOHYA),
        "model.img_in.lora_up.weight, which diffusers' converter",
    ),
    "CLIP's part beside the transformer's in another spelling": (
        pair(f"transformer.{BLOCK}", KOHYA) | pair(f"lora_te1_{CLIP.replace('.', '_')}", KOHYA),
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight, which diffusers' converter",
    ),
    "a change of a norm": (
        pair("diffusion_model.img_in", KOHYA) | {"diffusion_model.double_blocks.0.img_attn.norm.diff": torch.ones(16)},
        "norm.diff, which is no part of a LoRA",
    ),
    "a bias": (
        pair(f"transformer.{BLOCK}", PEFT) | {f"transformer.{BLOCK}.lora_B.bias": torch.ones(32)},
        rf"transformer.{BLOCK}.lora_B.bias, which is no part of a LoRA",
    ),
    "an alpha of no layer": (
        pair(f"transformer.{BLOCK}", PEFT) | {"transformer.proj_out.alpha": torch.tensor(2.0)},
        "transformer.proj_out.alpha, which is no part of a LoRA",
    ),
    "half a pair": (
        {f"lora_unet_{BLOCK}.lora_down.weight": torch.ones(2, 32)},
        f"lora_unet_{BLOCK} has no pair of matrices",
    ),
    "a layer of another model, in OneTrainer's keys": (
        pair("lora_transformer_transformer_blocks_7_attn_to_q", KOHYA, alpha=ALPHA),
        "lora_transformer_transformer_blocks_7_attn_to_q.alpha, which is not part of the model",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_be_dropped_is_refused_by_name(tmp_path: Path, case: str) -> None:
    file, said = REFUSED[case]
    save_file(file, tmp_path / "lora")
    with pytest.raises(WrongWeights, match=f"lora: .*{said}"):
        engine_with(None, str(tmp_path / "lora"))


def test_a_dropped_layer_that_changes_nothing_is_left_out(tmp_path: Path) -> None:
    """ComfyUI saves CLIP's embeddings of positions too, as zeros."""
    stem = "text_encoders.clip_l.transformer.text_model"
    zeros = {name: 0 * tensor for name, tensor in pair(f"{stem}.embeddings.position_embedding", KOHYA).items()}
    file = pair("diffusion_model.double_blocks.0.img_attn.proj", KOHYA)
    assert changes(read(tmp_path, file | zeros)).keys() == {"transformer_blocks.0.attn.to_out.0"}
    zeros = {name: tensor + 1 for name, tensor in zeros.items()}
    with pytest.raises(WrongWeights, match=r"position_embedding\.lora_up.weight"):
        read(tmp_path, file | zeros)


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_alphas_count_with_a_prefix_and_without(tmp_path: Path, prefix: str) -> None:
    file = pair(f"{prefix}{BLOCK}", PEFT, alpha=ALPHA) | pair(f"{prefix}proj_out", PEFT, 64)
    found = changes(read(tmp_path, file))
    torch.testing.assert_close(found[BLOCK], ALPHA / RANK * product(file, f"{prefix}{BLOCK}", PEFT))
    torch.testing.assert_close(found["proj_out"], product(file, f"{prefix}proj_out", PEFT))


def test_xlabs_keys_are_read_as_diffusers_reads_them(tmp_path: Path) -> None:
    words = ("down", "up")
    double, single = "double_blocks.0.processor", "single_blocks.0.processor"
    file = pair(f"{double}.proj_lora1", words) | pair(f"{double}.proj_lora2", words)
    file |= pair(f"{single}.proj_lora", words, columns=160)
    for stem in (f"{double}.qkv_lora1", f"{double}.qkv_lora2", f"{single}.qkv_lora"):
        file |= pair(stem, words, 96)
    found = read(tmp_path, file)
    weights = {f"{name}.weight": torch.zeros(SHAPES[f"{name}.weight"]) for name in found.transformer}
    expected = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    added = {name: tensor.clone() for name, tensor in original(expected).items()}
    for ours, theirs in (
        ("double_blocks.0.img_attn.proj", f"{double}.proj_lora1"),
        ("double_blocks.0.txt_attn.proj", f"{double}.proj_lora2"),
        ("double_blocks.0.img_attn.qkv", f"{double}.qkv_lora1"),
        ("double_blocks.0.txt_attn.qkv", f"{double}.qkv_lora2"),
    ):
        added[f"{ours}.weight"] += product(file, theirs, words)
    for name, change in changes(found).items():
        weights[f"{name}.weight"] += change
    mine = original(expected | weights)
    for name in (name for name in added if name.startswith("double_blocks")):
        torch.testing.assert_close(mine[name], added[name], msg=name)
    single_qkv = torch.cat([weights[f"single_transformer_blocks.0.attn.to_{letter}.weight"] for letter in "qkv"])
    torch.testing.assert_close(single_qkv, product(file, f"{single}.qkv_lora", words))
    proj_out = weights["single_transformer_blocks.0.proj_out.weight"]
    torch.testing.assert_close(proj_out, product(file, f"{single}.proj_lora", words))
    assert len(weights) == 2 + 6 + 3 + 1
    assert inspect(tmp_path / "lora").format == "lora"


def every_layer(shapes: dict[str, tuple[int, ...]]) -> list[tuple[str, int, int]]:
    """Name, rows and columns of each layer of the tiny transformer."""
    return [(name.removesuffix(".weight"), shape[0], shape[1]) for name, shape in shapes.items() if len(shape) == 2]


def test_onetrainers_keys_name_every_layer(tmp_path: Path) -> None:
    clip = f"lora_te1_{CLIP.replace('.', '_')}"
    file = pair(clip, KOHYA, alpha=ALPHA)
    for name, rows, columns in every_layer(SHAPES):
        file |= pair(f"lora_transformer_{name.replace('.', '_')}", KOHYA, rows, columns, ALPHA)
    found = changes(read(tmp_path, file))
    assert found.keys() == {CLIP} | {name for name, _, _ in every_layer(SHAPES)}
    torch.testing.assert_close(found[CLIP], ALPHA / RANK * product(file, clip, KOHYA))
    for name, _, _ in every_layer(SHAPES):
        stem = f"lora_transformer_{name.replace('.', '_')}"
        torch.testing.assert_close(found[name], ALPHA / RANK * product(file, stem, KOHYA), msg=name)


def test_onetrainers_keys_of_attention_are_read_as_diffusers_reads_them(tmp_path: Path) -> None:
    names = [name for name, _, _ in every_layer(SHAPES) if ".attn." in name]
    file: Tensors = {}
    for name in names:
        file |= pair(f"lora_transformer_{name.replace('.', '_')}", KOHYA, alpha=ALPHA)
    theirs = FluxPipeline.lora_state_dict(dict(file))
    found = changes(read(tmp_path, file))
    assert found.keys() == set(names)
    for name in names:
        torch.testing.assert_close(found[name], product(theirs, f"transformer.{name}", PEFT), msg=name)


def peft_file() -> Tensors:
    file: Tensors = {}
    for name, rows, columns in every_layer(SHAPES):
        file |= pair(f"base_model.model.{name}", PEFT, rows, columns)
    return file


@pytest.mark.parametrize(
    ("settings", "of_q", "of_others"),
    [
        ({"lora_alpha": 8}, 2, 2),
        ({"lora_alpha": 8, "use_rslora": True}, 4, 4),
        ({"lora_alpha": 8, "alpha_pattern": {r"transformer_blocks\.\d+\.attn\.to_q": 2}}, 0.5, 2),
    ],
)
def test_what_peft_saves_has_its_strength_from_the_file_beside_it(
    tmp_path: Path, settings: dict[str, object], of_q: float, of_others: float
) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": RANK} | settings))
    file = peft_file()
    found = changes(read(tmp_path, file))
    assert found.keys() == {name for name, _, _ in every_layer(SHAPES)}
    for name, change in found.items():
        factor = of_q if name == BLOCK else of_others
        torch.testing.assert_close(change, factor * product(file, f"base_model.model.{name}", PEFT), msg=name)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "lora: peft keeps its lora_alpha in adapter_config.json, which is to stand beside it"),
        ("{", "adapter_config.json: damaged"),
        ('{"r": 4}', "adapter_config.json: it has no number as lora_alpha"),
        ('{"lora_alpha": 4, "use_dora": true}', "a DoRA"),
        ('{"lora_alpha": 4, "alpha_pattern": {"(": 2}}', "its alpha_pattern is no regular expression"),
    ],
)
def test_without_its_settings_what_peft_saves_is_refused(tmp_path: Path, text: str | None, said: str) -> None:
    if text is not None:
        (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(WrongWeights, match=said):
        read(tmp_path, peft_file())
