"""The FLUX step engine: diffusers' own components, our loop.

`FluxPipeline.__call__` draws one request from start to end; it cannot be interleaved, cancelled or watched. This
engine takes the same components through the same arithmetic one step at a time, in five verbs: encode, noise,
schedule, denoise, decode. With `acceleration: none` its pixels equal `FluxPipeline.__call__`'s bit for bit.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps

from pipelines.acceleration import PRESETS
from pipelines.engine.base import EngineInfo, Pixels, Thumbnail
from pipelines.engine.canvas import CanvasFit, Range, fit, inside, pad_to_size
from pipelines.engine.forward import forward
from pipelines.engine.img2img import prepare_img2img_latents
from pipelines.engine.lru import LRUCache
from pipelines.engine.modulation import TransformerVariant
from pipelines.engine.preview import draw_preview
from pipelines.engine.sample import Sample, Text, rows
from pipelines.engine.vae_tiling import tiles
from pipelines.errors import NonFinitePixels
from pipelines.fields import Size
from pipelines.request import ImageRequest
from weights.latent_rgb import LatentRGB

UNGUIDED = "guidance_scale: this model has no guidance; ignored"
TILED = "decode: in overlapping tiles, which is not exact (SRPO_TILE_ABOVE)"
Rotary = tuple[torch.Tensor, torch.Tensor]
Once = Callable[[str, Callable[[], str]], str]


class FluxEngine:
    """An `Engine` on a diffusers FLUX pipeline. One thread at a time. `OPTIMIZATIONS` (`levers.py`) make it fast."""

    def __init__(
        self,
        pipeline: FluxPipeline,
        text_tokens: int,
        info: EngineInfo,
        preview: LatentRGB | None = None,
        guidance: Range | None = None,
        canvas: tuple[int, int] | None = None,
    ) -> None:
        self.info = info
        self._guidance = guidance
        self._canvas = canvas
        self._preview = preview
        self.pipeline = pipeline
        self._transformer = pipeline.transformer
        self._text_tokens = text_tokens
        self.device = pipeline._execution_device  # a part that is streamed to it says where it waits
        self.variants = dict.fromkeys(
            PRESETS, TransformerVariant(pipeline.transformer, info.dtype)
        )  # what draws each preset
        self.texts: LRUCache[str, Text] = LRUCache()
        self.rotaries: LRUCache[tuple[Size, int], Rotary] = LRUCache()
        self.compiler: Any = "inductor"
        self.remember: Once = lambda _, find: find()  # how a choice is made that must stay: found anew, or kept
        self.tile_above: float | None = None  # megapixels
        self.remarks: tuple[str, ...] = ()  # what every reply must say
        self.batches: dict[Size, tuple[int, ...]] = {}  # how many samples of a size may share a step, but for one

    @torch.inference_mode()
    def prepare(self, request: ImageRequest) -> list[Sample]:
        canvas_fit = self.fit(request)
        text = self.texts.get(request.prompt, lambda: self.encode(request.prompt))
        samples = [self.sample(canvas_fit, text, seed) for seed in request.seeds]
        self.look_up(samples)
        return samples

    def distinct_variants(self) -> list[TransformerVariant]:
        return list({id(variant): variant for variant in self.variants.values()}.values())

    def batch_limit(self, request: ImageRequest) -> int:
        return max(self.batches.get(self.fit(request).drawn, ()), default=1)

    def select_batch(self, candidates: Sequence[Sample]) -> list[Sample]:
        first = candidates[0]
        alike = [sample for sample in candidates if sample.kind == first.kind]
        allowed = (count for count in self.batches.get(first.size, ()) if count <= len(alike))
        return alike[: max(allowed, default=1)]

    @torch.inference_mode()
    def preview(self, sample: Sample, side: int) -> Thumbnail | None:
        if self._preview is None:
            return None
        drawn, wanted = sample.size, inside(sample.canvas_fit.size, Size(side, side))
        small = draw_preview(self._preview, sample.clean, sample.request, max(inside(drawn, wanted)))
        if small is None or drawn == sample.canvas_fit.size:
            return small
        return Thumbnail(*wanted, pad_to_size(small.data, Size(small.width, small.height), wanted))

    @torch.inference_mode()
    def finish(self, sample: Sample) -> Pixels:
        pixels = pad_to_size(self.decode(sample), sample.size, sample.canvas_fit.size)
        tiled = self._in_tiles(sample.request)
        notes = (*self.remarks, *sample.canvas_fit.notes, *sample.text.notes, *([TILED] if tiled else []))
        return Pixels(pixels, (*notes, *([UNGUIDED] if sample.guidance is None else [])))

    def _in_tiles(self, request: ImageRequest) -> bool:
        """Decided by the size alone, never by the memory that is free: the same request gives the same bytes."""
        return self.tile_above is not None and request.pixels > self.tile_above * 2**20

    def fit(self, request: ImageRequest) -> CanvasFit:
        return fit(request, self._canvas, self._guidance)

    def steps_left(self, sample: Sample) -> int:
        return len(sample.timesteps) - sample.step

    def sample(self, canvas_fit: CanvasFit, text: Text, seed: int) -> Sample:
        request = canvas_fit.request
        scheduler, timesteps = self.schedule(request)
        if request.source is None:
            latents, image_ids = self.noise(request.width, request.height, seed, text.states.dtype)
        else:
            latents, image_ids = prepare_img2img_latents(
                self.pipeline, request, request.source, scheduler, timesteps[0], seed, text.states.dtype
            )
        guidance = None
        if self._transformer.config.guidance_embeds:
            guidance = torch.full([1], request.guidance_scale, device=self.device, dtype=torch.float32)
        times = tuple(timesteps.tolist())
        computed, variant = PRESETS[request.acceleration](len(times)), self.variants[request.acceleration]
        return Sample(canvas_fit, text, latents, image_ids, guidance, scheduler, timesteps, times, computed, variant)

    def encode(self, prompt: str) -> Text:
        """Both encoders' view of the prompt."""
        states, pooled, ids = self.pipeline.encode_prompt(
            prompt=prompt, prompt_2=None, device=self.device, max_sequence_length=self._text_tokens
        )
        return Text(states, pooled, ids, self._notes(prompt))

    def _notes(self, prompt: str) -> tuple[str, ...]:
        """Say when the prompt is longer than what the model reads; diffusers would cut it with only a log line."""
        tokens = len(self.pipeline.tokenizer_2(prompt, verbose=False).input_ids)
        if tokens <= self._text_tokens:
            return ()
        return (f"prompt: the model read the first {self._text_tokens} of {tokens} tokens",)

    def noise(self, width: int, height: int, seed: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Packed starting latents and their position ids. The generator is the CPU's: the same on every device."""
        generator = torch.Generator("cpu").manual_seed(seed)
        channels = self._transformer.config.in_channels // 4
        latents: torch.Tensor
        image_ids: torch.Tensor
        latents, image_ids = self.pipeline.prepare_latents(1, channels, height, width, dtype, self.device, generator)
        return latents, image_ids

    def schedule(self, request: ImageRequest) -> tuple[FlowMatchEulerDiscreteScheduler, torch.Tensor]:
        """This sample's own copy of the model's scheduler, and the timesteps to carry out `(request.steps,)`."""
        steps, side = request.num_inference_steps, 2 * self.pipeline.vae_scale_factor  # pixels of a token's side
        tokens = (request.height // side) * (request.width // side)
        config = self.pipeline.scheduler.config
        scheduler = type(self.pipeline.scheduler).from_config(config)
        mu = calculate_shift(
            tokens,
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", 1.15),
        )
        sigmas = None if config.get("use_flow_sigmas") else np.linspace(1.0, 1 / steps, steps)
        timesteps, _ = retrieve_timesteps(scheduler, steps, self.device, sigmas=sigmas, mu=mu)
        first = len(timesteps) - request.steps
        scheduler.set_begin_index(first)
        return scheduler, timesteps[first:]

    def look_up(self, samples: list[Sample]) -> None:
        """Give the samples of one request what is worked out once, where levers say so, instead of in every step."""
        first = samples[0]
        if self.rotaries.limit:
            ids = torch.cat((first.text.ids, first.image_ids), dim=0)
            key = (first.size, len(first.text.ids))
            first.rotary = self.rotaries.get(key, lambda: first.variant.transformer.pos_embed(ids))
        if first.variant.modulation:
            times = first.timesteps.to(first.latents.dtype) / 1000
            first.modulation = first.variant.modulation.table(times, first.guidance, first.text.pooled)
        for sample in samples:
            sample.rotary, sample.modulation = first.rotary, first.modulation

    @torch.inference_mode()
    def step(self, samples: Sequence[Sample]) -> None:
        """Take one denoising step of all samples in one forward pass. If it raises, all of them are as before.

        Raises `ValueError` for samples that cannot be rows of one pass.
        """
        if len({sample.kind for sample in samples}) != 1:
            raise ValueError("samples of different kinds cannot share a forward pass")
        now = rows([sample.timesteps[sample.step : sample.step + 1] for sample in samples])
        guidances = [sample.guidance for sample in samples if sample.guidance is not None]
        tables = [sample.modulation[sample.step, None] for sample in samples if sample.modulation is not None]
        first = samples[0]
        variant = first.variant
        inputs: dict[str, Any] = {
            "hidden_states": rows([sample.latents for sample in samples]),
            "timestep": now.to(first.latents.dtype) / 1000,  # cast first: bf16 rounds differently otherwise
            "guidance": rows(guidances) if guidances else None,
            "pooled_projections": rows([sample.text.pooled for sample in samples]),
            "encoder_hidden_states": rows([sample.text.states for sample in samples]),
            "txt_ids": first.text.ids,
            "img_ids": first.image_ids,
        }
        whole, compute = all(first.computed), first.computed[first.step]
        try:
            if whole and not tables and first.rotary is None:
                velocities = variant.transformer(**inputs, joint_attention_kwargs={}, return_dict=False)[0]
            else:
                expected = None if compute else rows([sample.residuals.at(sample.time) for sample in samples])
                vectors = variant.modulation.split(rows(tables)) if variant.modulation else None
                known: dict[str, Any] = {"rotary": first.rotary, "modulation": vectors}
                velocities, residuals = forward(variant.transformer, expected, **known, **inputs)
        except torch.OutOfMemoryError:  # what did not fit once is not tried again
            self.batches[first.size] = tuple(n for n in self.batches.get(first.size, ()) if n < len(samples))
            raise
        for row, sample in enumerate(samples):
            sample.advance(velocities[row : row + 1], residuals[row : row + 1] if compute and not whole else None)

    def decode(self, sample: Sample) -> bytes:
        """8-bit RGB, `height * width * 3` bytes. Raises `NonFinitePixels`."""
        pipeline, request = self.pipeline, sample.request
        latents = pipeline._unpack_latents(sample.latents, request.height, request.width, pipeline.vae_scale_factor)
        latents = latents / pipeline.vae.config.scaling_factor + pipeline.vae.config.shift_factor
        with tiles(pipeline.vae, pipeline.vae_scale_factor) if self._in_tiles(request) else nullcontext():
            image = pipeline.vae.decode(latents, return_dict=False)[0]
        if not torch.isfinite(image).all():
            raise NonFinitePixels
        image = pipeline.image_processor.denormalize(image)[0]
        rows = image.permute(1, 2, 0).float().mul(255).round().to(torch.uint8)
        data: bytes = rows.contiguous().cpu().numpy().tobytes()
        return data

    def failure(self, error: Exception) -> str | None:
        """Out of memory and plain errors are the request's; any other CUDA error has poisoned the process."""
        if isinstance(error, torch.OutOfMemoryError):
            torch.cuda.empty_cache()
            return "OutOfMemory"
        if isinstance(error, torch.AcceleratorError) or "CUDA error" in str(error):
            return None
        return "GenerationFailed"
