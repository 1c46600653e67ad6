"""Previews: the right way up, in the right colours, small, and without a trace in the finished picture."""

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline

from pipelines.engine.base import EngineInfo, Thumbnail
from pipelines.engine.flux import FluxEngine
from pipelines.engine.options import EngineOptions
from pipelines.engine.preview import LatentPreview
from pipelines.request import GenerationParams, ImageRequest
from weights import tiny
from weights.latent_rgb import FLUX_LATENT_RGB, LatentRGB

PREVIEW = LatentPreview(FLUX_LATENT_RGB, torch.device("cpu"))


def ask(width: int, height: int, steps: int = 3) -> ImageRequest:
    body = {"prompt": "a red apple", "image_size": {"width": width, "height": height}, "num_inference_steps": steps}
    return GenerationParams.model_validate(body | {"seed": 5}).to_request("tiny")


def array(picture: Thumbnail | None) -> np.ndarray:
    assert picture is not None
    return np.frombuffer(picture.data, np.uint8).reshape(picture.height, picture.width, 3)


@pytest.mark.parametrize(("width", "height"), [(512, 512), (1440, 512), (544, 672)])
def test_the_map_sees_the_latents_as_the_vae_does(width: int, height: int) -> None:
    packed = torch.randn(1, (width // 16) * (height // 16), 64)
    latents = FluxPipeline._unpack_latents(packed, height, width, 8)[0]
    colours = torch.einsum("chw,cr->hwr", latents, torch.tensor(FLUX_LATENT_RGB.factors)) + torch.tensor(
        FLUX_LATENT_RGB.bias
    )
    expected = ((colours.clamp(-1, 1) + 1) * 127.5).round().numpy()
    got = array(PREVIEW.draw(packed, ask(width, height), 10_000))
    assert np.abs(got - expected).max() <= 1


def test_a_small_preview_is_an_average_that_keeps_the_shape() -> None:
    packed = torch.randn(1, 96 * 48, 64)
    small = array(PREVIEW.draw(packed, ask(1536, 768), 32))
    large = array(PREVIEW.draw(packed, ask(1536, 768), 10_000))
    assert small.shape == (16, 32, 3)
    blocks = large.reshape(16, 6, 32, 6, 3).mean((1, 3))
    assert np.abs(small - blocks).max() < 2
    assert small.std() < large.std() / 3


def test_a_map_for_another_vae_gives_no_preview() -> None:
    other = LatentRGB(FLUX_LATENT_RGB.factors[:4], FLUX_LATENT_RGB.bias)
    assert LatentPreview(other, torch.device("cpu")).draw(torch.randn(1, 1024, 64), ask(512, 512), 32) is None


def test_looking_changes_nothing_and_the_last_look_is_at_the_finished_latents() -> None:
    options = EngineOptions(EngineInfo("tiny", "cpu", "float32", ""), tiny.TEXT_TOKENS, preview=FLUX_LATENT_RGB)
    engine = FluxEngine(tiny.build(), options)
    request = ask(512, 512)
    (seen,), (unseen,) = engine.prepare(request), engine.prepare(request)
    assert engine.preview(seen, 32) is None
    while engine.steps_left(seen):
        engine.step([seen])
        engine.step([unseen])
        assert array(engine.preview(seen, 32)).shape == (32, 32, 3)
    assert seen.clean is not None
    assert torch.equal(seen.clean, seen.latents)
    assert engine.finish(seen) == engine.finish(unseen)
