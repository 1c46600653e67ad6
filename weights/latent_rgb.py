"""Linear maps from a VAE's latents to RGB, for previews of an unfinished image without running the VAE."""

from typing import NamedTuple


class LatentRGB(NamedTuple):
    """Three weights (R, G, B) for each latent channel, and a bias; the result is RGB from -1 to 1.

    The latents are those the transformer works on: shifted and scaled by the VAE's configuration.
    """

    factors: tuple[tuple[float, float, float], ...]
    bias: tuple[float, float, float]


FLUX_LATENT_RGB = LatentRGB(  # the fit for FLUX.1's VAE that ComfyUI publishes (`Flux.latent_rgb_factors`)
    factors=(
        (-0.0346, 0.0244, 0.0681),
        (0.0034, 0.0210, 0.0687),
        (0.0275, -0.0668, -0.0433),
        (-0.0174, 0.0160, 0.0617),
        (0.0859, 0.0721, 0.0329),
        (0.0004, 0.0383, 0.0115),
        (0.0405, 0.0861, 0.0915),
        (-0.0236, -0.0185, -0.0259),
        (-0.0245, 0.0250, 0.1180),
        (0.1008, 0.0755, -0.0421),
        (-0.0515, 0.0201, 0.0011),
        (0.0428, -0.0012, -0.0036),
        (0.0817, 0.0765, 0.0749),
        (-0.1264, -0.0522, -0.1103),
        (-0.0280, -0.0881, -0.0499),
        (-0.1262, -0.0982, -0.0778),
    ),
    bias=(-0.0329, -0.0718, -0.0851),
)
