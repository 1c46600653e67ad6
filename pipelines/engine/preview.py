"""A rough picture from packed latents by one small matrix product, while an image is being drawn."""

import torch
from torch.nn.functional import interpolate

from pipelines.engine.base import Thumbnail
from pipelines.engine.device_queue import copy_to_device
from pipelines.request import ImageRequest
from weights.latent_rgb import LatentRGB

PATCH = 2  # latents a side in one packed token


class LatentPreview:
    """Draws previews by a map whose weights are on the device."""

    def __init__(self, colours: LatentRGB, device: torch.device) -> None:
        self._factors, self._bias = (copy_to_device(torch.tensor(part), device) for part in colours)

    def draw(self, clean: torch.Tensor | None, request: ImageRequest, side: int) -> Thumbnail | None:
        """From packed latents `(1, tokens, channels * 4)` to a picture of at most `side` pixels on its longer side.

        None before the first step, or if the map is for another number of channels. Pixels are averages of areas,
        so a small `side` blurs. Waits for the device once, for the pixels.
        """
        if clean is None or clean.shape[2] != len(self._factors) * PATCH**2:
            return None
        columns = round((clean.shape[1] * request.width / request.height) ** 0.5)
        rows = clean.shape[1] // columns
        latents = clean[0].float().view(rows, columns, -1, PATCH, PATCH).permute(2, 0, 3, 1, 4)
        latents = latents.reshape(-1, rows * PATCH, columns * PATCH)
        picture = torch.einsum("chw,cr->rhw", latents, self._factors) + self._bias[:, None, None]
        scale = min(1.0, side / max(picture.shape[1:]))
        size = [max(1, round(length * scale)) for length in picture.shape[1:]]
        small = interpolate(picture[None], size=size, mode="area")[0]
        bytes_ = small.add(1).mul(127.5).nan_to_num(0).clamp(0, 255).round().to(torch.uint8).permute(1, 2, 0)
        return Thumbnail(size[1], size[0], bytes_.contiguous().cpu().numpy().tobytes())
