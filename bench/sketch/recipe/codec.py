"""The linear code the autoencoder starts from: whitened principal components of 32x32 patches.

A from-scratch autoencoder spends most of its time finding a good code. Principal components are one, found in a
minute: the decoder only has to invert them, and the transformer can train on them before any decoder exists.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from bench.sketch.recipe.atlas import Atlas
from bench.sketch.recipe.concepts import SCENES, Concept
from bench.sketch.recipe.data import TOKEN, Scene, Thing, draw_ground, make_scene, plain_colour, render
from bench.sketch.recipe.layouts import window_start

PATCH = 32  # pixels of a latent's side: the VAE's scale factor
CHANNELS = 32  # a token holds four latents: its 128 numbers must fit the transformer's width with room to spare
WHITENING = 0.6  # exponent: 0 keeps the components' variances, 1 makes them equal


@dataclass(frozen=True)
class Codec:
    """`encode`: RGB in 0..1 `(H, W, 3)` to latents `(32, H / 32, W / 32)` of unit mean variance; `decode` inverts."""

    mean: torch.Tensor  # (3072,)
    forward: torch.Tensor  # (3072, 32)
    backward: torch.Tensor  # (32, 3072)

    def encode(self, image: np.ndarray) -> torch.Tensor:
        patches = torch.from_numpy(split(image))
        height, width = image.shape[0] // PATCH, image.shape[1] // PATCH
        return ((patches - self.mean) @ self.forward).T.reshape(CHANNELS, height, width)

    def decode(self, latents: torch.Tensor) -> np.ndarray:
        _, height, width = latents.shape
        patches = (latents.reshape(CHANNELS, -1).T.float() @ self.backward + self.mean).numpy()
        tiles = patches.reshape(height, width, PATCH, PATCH, 3).transpose(0, 2, 1, 3, 4)
        return tiles.reshape(height * PATCH, width * PATCH, 3)

    @property
    def offset(self) -> torch.Tensor:
        """The code of a black patch, `(32,)`."""
        return -self.mean @ self.forward

    def save(self, path: Path) -> None:
        save_file({"mean": self.mean, "forward": self.forward, "backward": self.backward}, path)

    @classmethod
    def load(cls, path: Path) -> "Codec":
        return cls(**load_file(path))

    @classmethod
    @torch.no_grad()
    def of(cls, vae: AutoencoderKL) -> "Codec":
        """The code that an autoencoder of an earlier edition was set to: its encoder is linear (see `encoder`)."""
        black = -torch.ones(1, 3, 2 * PATCH, 2 * PATCH)
        offset = vae.encode(black).latent_dist.mode()[0, :, 0, 0]
        rows = []
        pixels_alone = torch.eye(PATCH * PATCH * 3).view(-1, PATCH, PATCH, 3).permute(0, 3, 1, 2)
        for pixels in torch.chunk(pixels_alone, PATCH):
            lit = black.repeat(len(pixels), 1, 1, 1)
            lit[..., :PATCH, :PATCH] += 2 * pixels
            rows.append(vae.encode(lit).latent_dist.mode()[..., 0, 0] - offset)
        forward = torch.cat(rows)
        backward = torch.linalg.pinv(forward)
        return cls(-offset @ backward, forward, backward)


def split(image: np.ndarray) -> np.ndarray:
    """`(H, W, 3)` to patches `(H / 32 * W / 32, 3072)`."""
    height, width = image.shape[0] // PATCH, image.shape[1] // PATCH
    tiles = image.reshape(height, PATCH, width, PATCH, 3).transpose(0, 2, 1, 3, 4)
    return np.ascontiguousarray(tiles.reshape(height * width, PATCH * PATCH * 3), dtype=np.float32)


def fit(atlas: Atlas, scenes: int, seed: int) -> Codec:
    """Principal components over the patches of random scenes, plain background thinned out."""
    rng = np.random.default_rng(seed)
    sizes = [(8, 8), (8, 8), (8, 8), (16, 8), (8, 16)]
    total = np.zeros(PATCH * PATCH * 3, dtype=np.float64)
    square = np.zeros((PATCH * PATCH * 3,) * 2, dtype=np.float64)
    count = 0
    for number in range(scenes):
        width, height = sizes[number % len(sizes)]
        patches = split(render(make_scene(rng, width, height), atlas))
        busy = patches.std(axis=1) > 1e-3
        patches = np.concatenate([patches[busy], patches[~busy][: max(4, int(busy.sum() / 4))]])
        total += patches.sum(axis=0)
        square += patches.T @ patches
        count += len(patches)
    mean = total / count
    covariance = square / count - np.outer(mean, mean)
    values, vectors = np.linalg.eigh(covariance)
    values, vectors = values[::-1][:CHANNELS], vectors[:, ::-1][:, :CHANNELS]
    deviation = np.sqrt(values)
    scale = deviation**WHITENING * np.sqrt(np.mean((deviation ** (1 - WHITENING)) ** 2))
    return Codec(
        torch.tensor(mean, dtype=torch.float32),
        torch.tensor(vectors / scale, dtype=torch.float32).contiguous(),
        torch.tensor((vectors * scale).T.copy(), dtype=torch.float32),
    )


@dataclass
class Stamps:
    """Scenes as latents without drawing them: the code is linear, and objects lie on its grid.

    An object over a colour is `premultiplied + (1 - alpha) colour`, so its latents are a sum of four maps, made once.
    Over a scene it is drawn, but only the object's own square.
    """

    atlas: Atlas
    codec: Codec
    kept: dict[tuple[str, str | None, int], torch.Tensor] = field(default_factory=dict)
    scenes: dict[tuple[str, int, int], tuple[np.ndarray, torch.Tensor]] = field(default_factory=dict)

    def encode(self, scene: Scene) -> torch.Tensor:
        """What `codec.encode(render(scene))` gives, `(32, 2 height, 2 width)`."""
        per = TOKEN // PATCH
        latents = self._ground(scene)
        for thing in scene.things:
            for spot in thing.spots:
                left, top = spot[0] - window_start(scene.width), spot[1] - window_start(scene.height)
                x, y, side = left * per, top * per, thing.side * per
                latents[:, y : y + side, x : x + side] = self._over(thing, scene, left * TOKEN, top * TOKEN)
        return latents

    def _ground(self, scene: Scene) -> torch.Tensor:
        """The latents of the empty background."""
        if scene.background in SCENES:
            return self._scene(scene)[1].clone()
        patch = self.codec.encode(np.broadcast_to(plain_colour(scene.background), (PATCH, PATCH, 3)))
        per = TOKEN // PATCH
        return patch.expand(-1, scene.height * per, scene.width * per).clone()

    def _scene(self, scene: Scene) -> tuple[np.ndarray, torch.Tensor]:
        """The empty scene as a picture and as latents."""
        key = (scene.background, scene.width, scene.height)
        if key not in self.scenes:
            picture = draw_ground(*key)
            self.scenes[key] = picture, self.codec.encode(picture)
        return self.scenes[key]

    def _over(self, thing: Thing, scene: Scene, left: int, top: int) -> torch.Tensor:
        """The latents of an object's square over the background."""
        side = thing.side * TOKEN
        if scene.background not in SCENES:
            maps = self.maps(thing.concept, thing.colour, side)
            colour = torch.from_numpy(plain_colour(scene.background))
            return maps[0] + torch.einsum("c,cdhw->dhw", colour, maps[1:]) + self.codec.offset[:, None, None]
        drawn = self.atlas.picture(thing.concept, thing.colour, side)
        below = self._scene(scene)[0][top : top + side, left : left + side]
        return self.codec.encode(drawn[..., :3] + (1 - drawn[..., 3:]) * below)

    def maps(self, concept: Concept, colour: str | None, size: int) -> torch.Tensor:
        """`(4, 32, size / 32, size / 32)`: of the premultiplied picture, and of what shows through in each channel."""
        key = (concept.name, colour, size)
        if key not in self.kept:
            picture = self.atlas.picture(concept, colour, size)
            through = 1 - picture[..., 3:]
            layers = [picture[..., :3], *(through * channel for channel in np.eye(3, dtype=np.float32))]
            side = size // PATCH
            codes = [torch.from_numpy(split(layer)) @ self.codec.forward for layer in layers]
            self.kept[key] = torch.stack([code.T.reshape(CHANNELS, side, side) for code in codes])
        return self.kept[key]
