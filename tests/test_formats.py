"""The tiny transformer in every format: read back, the weights are equal (or rounded as the format rounds), and so
is the picture. LoRA files are merged into them."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.engines import ask, draw, engine_with, weights_of
from support.written_formats import TINY, WRITTEN, Tensors, original

from pipelines.engine.flux import FluxEngine
from server.engine_setup import build_engine_config
from server.settings.engine import EngineSettings
from weights import tiny
from weights.errors import WrongWeights
from weights.formats import lora
from weights.formats.architecture import TransformerConfig, tensor_shapes
from weights.formats.detect import FORMATS
from weights.lora_file import parse_lora

DEV = TransformerConfig()


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    """Another transformer than tiny's own, with weights of a sensible size."""
    torch.manual_seed(7)
    return {name: torch.randn(shape) * 0.1 for name, shape in tensor_shapes(TINY).items()}


def picture(engine: FluxEngine) -> np.ndarray:
    return np.frombuffer(draw(engine, ask(seed=5, steps=2))[0], np.uint8).astype(int)


@pytest.fixture(scope="module")
def plain(tensors: Tensors) -> np.ndarray:
    """The picture of those weights, loaded by torch itself."""
    engine = engine_with()
    engine._transformer.load_state_dict(tensors)
    return picture(engine)


@pytest.fixture(scope="module")
def fingerprint() -> str:
    """Of the model as it comes."""
    return engine_with().info.fingerprint


def test_every_row_is_written_here_but_loras_which_are_further_down() -> None:
    assert {row for row, _, _ in WRITTEN.values()} == FORMATS.keys() - {"lora"}


@pytest.mark.parametrize("case", WRITTEN)
def test_round_trip(tensors: Tensors, plain: np.ndarray, fingerprint: str, tmp_path: Path, case: str) -> None:
    _, write, error = WRITTEN[case]
    write(tensors, tmp_path / "file")
    engine = engine_with(tmp_path / "file")
    read = weights_of(engine)
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        furthest = (read[name] - tensor).abs().max()
        assert furthest <= error * tensor.abs().max(), name
    difference = np.abs(picture(engine) - plain)
    assert difference.mean() <= 40 * error
    assert engine.info.fingerprint != fingerprint


def test_bfloat16_is_rounded_once(tensors: Tensors, tmp_path: Path) -> None:
    WRITTEN["comfyui"][1](tensors, tmp_path / "file")
    read = weights_of(engine_with(tmp_path / "file", dtype="bfloat16"))
    assert all(torch.equal(read[name], tensor.bfloat16()) for name, tensor in tensors.items())


def test_scaled_fp8_is_better_than_unscaled(tensors: Tensors, tmp_path: Path) -> None:
    """Weights far from 1 show that the scales are used."""
    small = {name: tensor * 2**-8 for name, tensor in tensors.items()}
    for case in ("fp8", "fp8 scaled"):
        WRITTEN[case][1](small, tmp_path / case)
    name = "single_transformer_blocks.0.attn.to_k.weight"
    wrong = [
        (weights_of(engine_with(tmp_path / case))[name] - small[name]).abs().mean() for case in ("fp8", "fp8 scaled")
    ]
    assert wrong[1] < wrong[0] / 4


SCALED = "double_blocks.0.img_mlp.0"  # 128 rows of 32 values in tiny


def rescaled(tensors: Tensors, path: Path, scale: torch.Tensor) -> None:
    """The file of `fp8_scaled` with another scale for one matrix."""
    WRITTEN["fp8 scaled"][1](tensors, path)
    save_file(load_file(path) | {f"{SCALED}.scale_weight": scale}, path)


@pytest.mark.parametrize(
    ("scale", "said"),
    [
        (torch.ones(128, 2), r"has shape \[128, 2\], expected one scale, or one a row: \[1\], \[128\] or \[128, 1\]"),
        (torch.ones(64, 2), r"has shape \[64, 2\], expected"),  # as many numbers as the matrix has rows
        (torch.ones(32), r"has shape \[32\], expected"),
        (torch.ones(1, dtype=torch.float64), "holds F64, expected one of F32, BF16, F16"),
        (torch.ones(1).to(torch.float8_e8m0fnu), "holds F8_E8M0, expected one of F32, BF16, F16"),
    ],
    ids=["a scale a group", "a scale a block", "too few", "float64", "an exponent alone"],
)
def test_scales_that_are_not_of_rows_are_refused(
    tensors: Tensors, tmp_path: Path, scale: torch.Tensor, said: str
) -> None:
    rescaled(tensors, tmp_path / "file", scale)
    with pytest.raises(WrongWeights, match=f"file: {SCALED}.scale_weight {said}"):
        engine_with(tmp_path / "file")


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((), torch.float32), ((1, 1), torch.float16), ((128,), torch.bfloat16), ((128, 1), torch.float32)],
)
def test_a_scale_is_one_number_or_one_a_row(
    tensors: Tensors, tmp_path: Path, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    scale = torch.full(shape, 0.25, dtype=dtype)
    rescaled(tensors, tmp_path / "file", scale)
    stored = load_file(tmp_path / "file")[f"{SCALED}.weight"].float()
    read = weights_of(engine_with(tmp_path / "file"))
    assert torch.equal(read["transformer_blocks.0.ff.net.0.proj.weight"], stored * 0.25)


def test_what_does_not_fit_is_one_clear_line(tensors: Tensors, tmp_path: Path) -> None:
    save_file({name: tensor for name, tensor in tensors.items() if "guidance" not in name}, tmp_path / "schnell")
    with pytest.raises(
        WrongWeights, match=r"schnell: 4 tensors are missing \(first: time_text_embed.guidance_embedder"
    ):
        engine_with(tmp_path / "schnell")
    save_file({"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(2, 32)}, tmp_path / "lora")
    with pytest.raises(WrongWeights, match="name it with --lora"):
        engine_with(tmp_path / "lora")
    with pytest.raises(WrongWeights, match="not a LoRA"):
        engine_with(None, str(tmp_path / "schnell"))


RANK, ALPHA = 4, 8.0
TARGETS = {  # in the original keys: every linear layer whose width diffusers' converter does not take for granted
    name.removesuffix(".weight")
    for name, tensor in original({name: torch.empty(shape) for name, shape in tensor_shapes(TINY).items()}).items()
    if tensor.ndim == 2 and "linear1" not in name and not name.startswith(("vector_in", "guidance_in"))
}


def deltas(tensors: Tensors) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(3)
    found = {}
    for name, tensor in original(tensors).items():
        if (stem := name.removesuffix(".weight")) in TARGETS:
            found[stem] = (torch.randn(tensor.shape[0], RANK) * 0.1, torch.randn(RANK, tensor.shape[1]) * 0.1)
    return found


def kohya(pairs: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> Tensors:
    file: Tensors = {}
    for name, (up, down) in pairs.items():
        stem = "lora_unet_" + name.replace(".", "_")
        file |= {f"{stem}.lora_up.weight": up, f"{stem}.lora_down.weight": down, f"{stem}.alpha": torch.tensor(ALPHA)}
    return file


def comfyui(pairs: dict[str, tuple[torch.Tensor, torch.Tensor]], words: tuple[str, str]) -> Tensors:
    file: Tensors = {}
    for name, (up, down) in pairs.items():
        stem = f"diffusion_model.{name}"
        file |= {f"{stem}.{words[0]}.weight": up, f"{stem}.{words[1]}.weight": down}
        file |= {f"{stem}.alpha": torch.tensor(ALPHA)}
    return file


@pytest.mark.parametrize("scale", [1.0, -0.5])
@pytest.mark.parametrize(
    "keys",
    [
        kohya,
        lambda pairs: comfyui(pairs, ("lora_up", "lora_down")),
        lambda pairs: comfyui(pairs, ("lora_B", "lora_A")),
    ],
    ids=["kohya", "ComfyUI", "ComfyUI, peft's words"],
)
def test_a_lora_is_merged_whole(
    tensors: Tensors,
    plain: np.ndarray,
    tmp_path: Path,
    keys: Callable[[dict[str, tuple[torch.Tensor, torch.Tensor]]], Tensors],
    scale: float,
) -> None:
    pairs = deltas(tensors)
    save_file(keys(pairs), tmp_path / "lora")
    save_file(tensors, tmp_path / "file")
    engine = engine_with(tmp_path / "file", f"{tmp_path / 'lora'}:{scale}")
    merged = original(weights_of(engine))
    for name, tensor in original(tensors).items():
        expected = tensor
        if (stem := name.removesuffix(".weight")) in pairs:
            up, down = pairs[stem]
            expected = tensor + scale * ALPHA / RANK * (up @ down)
        torch.testing.assert_close(merged[name], expected, msg=name)
    assert not np.array_equal(picture(engine), plain)


def diffusers_lora(tensors: Tensors) -> tuple[Tensors, Tensors]:
    """A file's tensors, and what they add to the weights, before alpha."""
    torch.manual_seed(5)
    file: Tensors = {}
    added: Tensors = {}
    for name, tensor in tensors.items():
        if tensor.ndim == 2:
            up, down = torch.randn(tensor.shape[0], RANK) * 0.1, torch.randn(RANK, tensor.shape[1]) * 0.1
            stem = f"transformer.{name.removesuffix('.weight')}"
            file |= {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
            added[name] = up @ down
    return file, added


@pytest.mark.parametrize(
    ("adapter", "factor"),
    [
        ({}, 1),
        ({"transformer.lora_alpha": 2}, 2 / RANK),
        ({"transformer.lora_alpha": 2, "transformer.use_rslora": True}, 1),
    ],
)
def test_a_lora_in_diffusers_keys_is_merged_with_its_alpha(
    tensors: Tensors, tmp_path: Path, adapter: dict[str, object], factor: float
) -> None:
    file, added = diffusers_lora(tensors)
    save_file(file, tmp_path / "lora", metadata={"lora_adapter_metadata": json.dumps(adapter)})
    save_file(tensors, tmp_path / "file")
    merged = weights_of(engine_with(tmp_path / "file", str(tmp_path / "lora")))
    for name, tensor in tensors.items():
        torch.testing.assert_close(merged[name], tensor + factor * added[name] if name in added else tensor)


def test_loras_add_up_also_on_the_models_own_transformer_and_move_the_fingerprint(
    tensors: Tensors, fingerprint: str, tmp_path: Path
) -> None:
    file, added = diffusers_lora(tensors)
    save_file(file, tmp_path / "lora")
    one, two = (engine_with(None, *[f"{tmp_path / 'lora'}:0.5"] * count) for count in (1, 2))
    before, name = tiny.build().transformer.state_dict(), "proj_out.weight"
    torch.testing.assert_close(weights_of(one)[name], before[name] + 0.5 * added[name])
    torch.testing.assert_close(weights_of(two)[name], before[name] + added[name])
    assert len({fingerprint, one.info.fingerprint, two.info.fingerprint}) == 3


def test_the_part_for_the_text_encoder_is_merged_too(tmp_path: Path) -> None:
    up, down = torch.randn(32, 2), torch.randn(2, 32)
    layer = "text_model.encoder.layers.0.self_attn.q_proj"
    save_file(
        {f"text_encoder.{layer}.lora_A.weight": down, f"text_encoder.{layer}.lora_B.weight": up}, tmp_path / "diffusers"
    )
    stem = f"lora_te1_{layer.replace('.', '_')}"
    save_file(
        {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(2.0)},
        tmp_path / "kohya",
    )
    before = dict(tiny.build().text_encoder.named_modules())
    for name in ("diffusers", "kohya"):
        after = dict(engine_with(None, str(tmp_path / name)).pipeline.text_encoder.named_modules())
        changed = next(key for key in after if key.endswith("layers.0.self_attn.q_proj"))
        torch.testing.assert_close(after[changed].weight, before[changed].weight + up @ down)


def test_kohyas_fused_layer_of_a_single_block_at_flux_devs_width(tmp_path: Path) -> None:
    up, down = torch.randn(21504, 2), torch.randn(2, 3072)
    stem = "lora_unet_single_blocks_37_linear1"
    save_file({f"{stem}.lora_up.weight": up, f"{stem}.lora_down.weight": down}, tmp_path / "lora")
    found = lora.read(tmp_path / "lora", 1.0, tensor_shapes(DEV)).transformer
    parts = [f"single_transformer_blocks.37.{name}" for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")]
    assert sorted(found) == sorted(parts)
    rows = torch.cat([found[name].up @ found[name].down[:, :8] * found[name].factor for name in parts])
    torch.testing.assert_close(rows, up @ down[:, :8])


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("transformer.proj_out.dora_scale", "dora_scale: only plain LoRA"),
        ("lora_unet_img_in.diff_b", "diff_b: only plain LoRA"),
        ("transformer.no_such_layer.lora_A.weight", "has no pair of matrices"),
    ],
)
def test_what_a_converter_would_leave_out_is_refused(tensors: Tensors, tmp_path: Path, name: str, said: str) -> None:
    file, _ = diffusers_lora(tensors)
    save_file(file | {name: torch.ones(2, 2)}, tmp_path / "lora")
    with pytest.raises(WrongWeights, match=said):
        engine_with(None, str(tmp_path / "lora"))


def test_a_lora_for_another_width_does_not_fit(tmp_path: Path) -> None:
    pair = {"lora_A.weight": torch.ones(2, 3072), "lora_B.weight": torch.ones(3072, 2)}
    save_file({f"transformer.transformer_blocks.0.attn.to_q.{k}": v for k, v in pair.items()}, tmp_path / "lora")
    with pytest.raises(
        WrongWeights, match=r"changes transformer_blocks.0.attn.to_q as \[3072, 3072\], which is \[32, 32\]"
    ):
        engine_with(None, str(tmp_path / "lora"))


def test_the_settings_reach_the_engine(tmp_path: Path) -> None:
    settings = EngineSettings(model="tiny", transformer=tmp_path / "file", lora="a.safetensors:0.5,b")
    config = build_engine_config(settings)
    assert (config.transformer, config.loras) == (str(tmp_path / "file"), ("a.safetensors:0.5", "b"))


def test_a_lora_is_a_file_or_a_file_and_its_scale(tmp_path: Path) -> None:
    assert parse_lora("a.safetensors") == (Path("a.safetensors"), 1.0)
    assert parse_lora("a.safetensors:0.5") == (Path("a.safetensors"), 0.5)
    file = tmp_path / "odd:name"
    file.touch()
    assert parse_lora(str(file)) == (file, 1.0)
    assert parse_lora(f"{file}:2") == (file, 2.0)


@pytest.mark.parametrize("text", ["x.safetensors:abc", "x.safetensors:", "x.safetensors:nan", ":0.5"])
def test_a_scale_that_is_no_number_is_an_error_of_the_settings(text: str) -> None:
    with pytest.raises(ValueError, match=f"'{text}': expected FILE or FILE:SCALE"):
        parse_lora(text)
    with pytest.raises(ValueError, match="expected FILE or FILE:SCALE"):
        EngineSettings(model="tiny", lora=text)


def test_an_alpha_of_its_own_is_for_whole_names_of_modules() -> None:
    """As in peft: `to_q` is the module or its last name, and never the end of a longer one."""
    adapter = {"transformer.alpha_pattern": {"to_q": 8, "proj": 2}, "transformer.lora_alpha": 4}
    modules = {"to_q": 2.0, "blocks.0.to_q": 2.0, "blocks.0.add_to_q": 1.0, "blocks.0.q_proj": 1.0}
    for module, factor in modules.items():
        assert lora.adapter_scale(Path("x"), f"transformer.{module}", 4, adapter) == factor
