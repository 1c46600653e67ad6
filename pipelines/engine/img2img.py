"""How image-to-image begins: the source picture with as much noise as the first step expects.

The arithmetic is `FluxImg2ImgPipeline`'s: one generator draws the VAE's sample and then the noise.
"""

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from diffusers.pipelines.flux.pipeline_flux_img2img import retrieve_latents
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

from pipelines.engine.device_queue import copy_to_device
from pipelines.request import ImageRequest, Source


def prepare_img2img_latents(
    pipeline: FluxPipeline,
    request: ImageRequest,
    source: Source,
    scheduler: FlowMatchEulerDiscreteScheduler,
    timestep: torch.Tensor,
    seed: int,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed latents `(1, tokens, channels * 4)` of the source at `timestep` (a scalar), and their position ids."""
    device = pipeline._execution_device
    generator = torch.Generator("cpu").manual_seed(seed)
    picture = Image.frombytes("RGB", (request.width, request.height), source.pixels)
    pixels = pipeline.image_processor.preprocess(picture, height=request.height, width=request.width)
    pixels = copy_to_device(pixels.to(dtype), device)
    clean = retrieve_latents(pipeline.vae.encode(pixels), generator=generator)
    clean = (clean - pipeline.vae.config.shift_factor) * pipeline.vae.config.scaling_factor
    _, channels, height, width = clean.shape
    noise = copy_to_device(randn_tensor(clean.shape, generator=generator, dtype=dtype), device)
    latents = scheduler.scale_noise(clean, timestep[None], noise)
    packed: torch.Tensor = pipeline._pack_latents(latents, 1, channels, height, width)
    ids = pipeline._prepare_latent_image_ids(1, height // 2, width // 2, torch.device("cpu"), dtype)
    return packed, copy_to_device(ids, device)
