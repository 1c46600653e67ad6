"""The FLUX step engine: diffusers' own components in our loop.

`FluxPipeline.__call__` draws one request from start to end; it cannot be interleaved, cancelled or watched. This
engine runs the same components through the same arithmetic one step at a time: encode, noise and schedule (`prepare`),
`step`, and decode (`finish`). With `acceleration: none` its pixels equal `FluxPipeline.__call__`'s bit for bit.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps

from pipelines.acceleration import PRESETS
from pipelines.engine.base import EngineStatistics, Pixels, Thumbnail
from pipelines.engine.canvas import CanvasFit, count_before, enlarge, fit_canvas, fit_inside
from pipelines.engine.device_queue import Pacer, copy_to_device, read_memory
from pipelines.engine.failures import classify_failure, is_out_of_memory
from pipelines.engine.forward import Residuals, forward
from pipelines.engine.img2img import prepare_img2img_latents
from pipelines.engine.lru import LRUCache
from pipelines.engine.modulation import TransformerVariant
from pipelines.engine.options import EngineOptions
from pipelines.engine.preview import LatentPreview
from pipelines.engine.sample import Sample, Text, rows
from pipelines.engine.vae_tiling import decode_in_tiles
from pipelines.engine.vocabulary import describe_unknown_words
from pipelines.errors import NonFinitePixels
from pipelines.fields import Size
from pipelines.request import ImageRequest

UNGUIDED = "guidance_scale: this model has no guidance; ignored"
TILED = "decode: in overlapping tiles, which is not exact (SRPO_TILE_ABOVE)"
Rotary = tuple[torch.Tensor, torch.Tensor]


class FluxEngine:
    """An `Engine` on a diffusers FLUX pipeline, for one thread at a time.

    Complete when it is built: another engine (`OPTIMIZATIONS` make faster ones) is built from the same pipeline and
    changed options.
    """

    def __init__(self, pipeline: FluxPipeline, options: EngineOptions) -> None:
        self.pipeline = pipeline
        self.options = options
        self.info = options.info
        self.device = pipeline._execution_device  # not the transformer's, which may be in the host's memory
        unchanged = TransformerVariant(pipeline.transformer, options.info.dtype)
        self.variants = {preset: options.variants.get(preset, unchanged) for preset in PRESETS}
        self._transformer = pipeline.transformer
        self._texts: LRUCache[str, Text] = LRUCache(options.text_cache)
        self._rotaries: LRUCache[tuple[Size, int], Rotary] = LRUCache(options.rotary_cache)
        self._batches = dict(options.batches)  # fewer after a batch was out of memory
        self._pacer = Pacer(self.device)
        self._preview = LatentPreview(options.preview, self.device) if options.preview else None

    def change(self, **changes: Any) -> "FluxEngine":
        """An engine of changed options on the same pipeline, with empty caches. This one must not be used with it."""
        return type(self)(self.pipeline, replace(self.options, **changes))

    @torch.inference_mode()
    def prepare(self, request: ImageRequest) -> list[Sample]:
        canvas_fit = self.fit(request)
        text = self._texts.get(request.prompt, lambda: self.encode(request.prompt))
        samples = [self.sample(canvas_fit, text, seed) for seed in request.seeds]
        self._attach_cached(samples)
        self._pacer.drain()
        return samples

    def distinct_variants(self) -> list[TransformerVariant]:
        return list({id(variant): variant for variant in self.variants.values()}.values())

    def batch_limit(self, request: ImageRequest) -> int:
        return max(self._batches.get(self.fit(request).drawn, ()), default=1)

    def select_batch(self, candidates: Sequence[Sample]) -> list[Sample]:
        first = candidates[0]
        alike = [sample for sample in candidates if sample.kind == first.kind]
        allowed = (count for count in self._batches.get(first.size, ()) if count <= len(alike))
        return alike[: max(allowed, default=1)]

    @torch.inference_mode()
    def preview(self, sample: Sample, side: int) -> Thumbnail | None:
        if self._preview is None:
            return None
        drawn, wanted = sample.size, fit_inside(sample.canvas_fit.size, Size(side, side))
        small = self._preview.draw(sample.clean, sample.request, max(fit_inside(drawn, wanted)))
        if small is None or drawn == sample.canvas_fit.size:
            return small
        return Thumbnail(*wanted, enlarge(small.data, Size(small.width, small.height), wanted))

    @torch.inference_mode()
    def finish(self, sample: Sample) -> Pixels:
        sample.residuals = Residuals()  # decoding needs most memory, and no step comes after it
        pixels = enlarge(self.decode(sample), sample.size, sample.canvas_fit.size)
        tiled = self._is_tiled(sample.request)
        notes = (*self.options.remarks, *sample.canvas_fit.notes, *sample.text.notes, *([TILED] if tiled else []))
        return Pixels(pixels, (*notes, *([UNGUIDED] if sample.guidance is None else [])))

    def _is_tiled(self, request: ImageRequest) -> bool:
        """Decided by the size alone, never by the free memory: the same request gives the same bytes."""
        return self.options.tile_above is not None and request.pixels > self.options.tile_above * 2**20

    def fit(self, request: ImageRequest) -> CanvasFit:
        return fit_canvas(request, self.options.canvas, self._token, self.options.guidance)

    @property
    def _token(self) -> int:
        """Pixels of a token's side."""
        return 2 * int(self.pipeline.vae_scale_factor)

    def steps_left(self, sample: Sample) -> int:
        return len(sample.timesteps) - sample.step

    def sample(self, canvas_fit: CanvasFit, text: Text, seed: int) -> Sample:
        request = canvas_fit.request
        scheduler, timesteps, times = self.schedule(request)
        if request.source is None:
            latents, image_ids = self.noise(request.width, request.height, seed, text.states.dtype)
        else:
            latents, image_ids = prepare_img2img_latents(
                self.pipeline, request, request.source, scheduler, timesteps[0], seed, text.states.dtype
            )
        if self.options.canvas is not None:  # positions count from the canvas, wherever the picture begins
            before = count_before(canvas_fit.drawn, self.options.canvas, self._token)
            image_ids = image_ids - image_ids.new_tensor((0, *before))
        guidance = None
        if self._transformer.config.guidance_embeds:
            guidance = torch.full([1], request.guidance_scale, device=self.device, dtype=torch.float32)
        computed, variant = PRESETS[request.acceleration](len(times)), self.variants[request.acceleration]
        return Sample(canvas_fit, text, latents, image_ids, guidance, scheduler, timesteps, times, computed, variant)

    def encode(self, prompt: str) -> Text:
        """Encode the prompt with both encoders."""
        states, pooled, ids = self.pipeline.encode_prompt(
            prompt=prompt, prompt_2=None, device=self.device, max_sequence_length=self.options.text_tokens
        )
        return Text(states, pooled, ids, self._notes(prompt))

    def _notes(self, prompt: str) -> tuple[str, ...]:
        """Notes on what the model does not read: unknown words, and what is too long (diffusers only logs the cut)."""
        notes = () if self.options.words is None else describe_unknown_words(prompt, self.options.words)
        tokens = len(self.pipeline.tokenizer_2(prompt, verbose=False).input_ids)
        if tokens <= self.options.text_tokens:
            return notes
        return (*notes, f"prompt: the model read the first {self.options.text_tokens} of {tokens} tokens")

    def noise(self, width: int, height: int, seed: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Packed starting latents and their position ids. The generator is the CPU's: the same on every device."""
        generator = torch.Generator("cpu").manual_seed(seed)
        channels = self._transformer.config.in_channels // 4
        made: tuple[torch.Tensor, torch.Tensor]
        made = self.pipeline.prepare_latents(1, channels, height, width, dtype, torch.device("cpu"), generator)
        latents, image_ids = (copy_to_device(tensor, self.device) for tensor in made)
        return latents, image_ids

    def schedule(
        self, request: ImageRequest
    ) -> tuple[FlowMatchEulerDiscreteScheduler, torch.Tensor, tuple[float, ...]]:
        """This sample's own copy of the model's scheduler, and the timesteps to carry out `(request.steps,)`, twice: on
        the device, and as numbers.

        The schedule is made on the CPU, whose numbers are the same, so that nothing waits for the device to tell them.
        Its `sigmas` then go to the device: there a product with a number of the CPU would round differently.
        """
        steps = request.num_inference_steps
        tokens = (request.height // self._token) * (request.width // self._token)
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
        timesteps, _ = retrieve_timesteps(scheduler, steps, "cpu", sigmas=sigmas, mu=mu)
        first = len(timesteps) - request.steps
        scheduler.set_begin_index(first)
        scheduler.sigmas, scheduler.timesteps = (
            copy_to_device(tensor, self.device) for tensor in (scheduler.sigmas, timesteps)
        )
        return scheduler, scheduler.timesteps[first:], tuple(timesteps[first:].tolist())

    def _attach_cached(self, samples: list[Sample]) -> None:
        """Attach to the samples of one request what optimizations compute once instead of in every step."""
        first = samples[0]
        if self.options.rotary_cache:
            ids = torch.cat((first.text.ids, first.image_ids), dim=0)
            key = (first.size, len(first.text.ids))
            first.rotary = self._rotaries.get(key, lambda: first.variant.transformer.pos_embed(ids))
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
        timesteps = rows([sample.timesteps[sample.step : sample.step + 1] for sample in samples])
        guidances = [sample.guidance for sample in samples if sample.guidance is not None]
        tables = [sample.modulation[sample.step, None] for sample in samples if sample.modulation is not None]
        first = samples[0]
        variant = first.variant
        inputs: dict[str, Any] = {
            "hidden_states": rows([sample.latents for sample in samples]),
            "timestep": timesteps.to(first.latents.dtype) / 1000,  # cast first: bf16 rounds differently otherwise
            "guidance": rows(guidances) if guidances else None,
            "pooled_projections": rows([sample.text.pooled for sample in samples]),
            "encoder_hidden_states": rows([sample.text.states for sample in samples]),
            "txt_ids": first.text.ids,
            "img_ids": first.image_ids,
        }
        exact, compute = all(first.computed), first.computed[first.step]
        try:
            if exact and not tables and first.rotary is None:
                velocities = variant.transformer(**inputs, joint_attention_kwargs={}, return_dict=False)[0]
            else:
                extrapolated = None if compute else rows([sample.residuals.at(sample.time) for sample in samples])
                vectors = variant.modulation.split(rows(tables)) if variant.modulation else None
                cached: dict[str, Any] = {"rotary": first.rotary, "modulation": vectors}
                velocities, residuals = forward(variant.transformer, extrapolated, **cached, **inputs)
        except RuntimeError as error:
            if is_out_of_memory(error):  # a batch of this many is not tried again
                self._batches[first.size] = tuple(n for n in self._batches.get(first.size, ()) if n < len(samples))
            raise
        for row, sample in enumerate(samples):
            sample.advance(velocities[row : row + 1], residuals[row : row + 1] if compute and not exact else None)
        self._pacer.after_step()
        if not all(self.steps_left(sample) for sample in samples):
            self._pacer.drain()

    def decode(self, sample: Sample) -> bytes:
        """8-bit RGB, `height * width * 3` bytes. Raises `NonFinitePixels`."""
        pipeline, request = self.pipeline, sample.request
        latents = pipeline._unpack_latents(sample.latents, request.height, request.width, pipeline.vae_scale_factor)
        latents = latents / pipeline.vae.config.scaling_factor + pipeline.vae.config.shift_factor
        with decode_in_tiles(pipeline.vae, pipeline.vae_scale_factor) if self._is_tiled(request) else nullcontext():
            image = pipeline.vae.decode(latents, return_dict=False)[0]
        finite = torch.isfinite(image).all()
        image = pipeline.image_processor.denormalize(image)[0]
        pixels = image.permute(1, 2, 0).float().mul(255).round().to(torch.uint8)
        # Pixels and verdict come in one copy: the host waits for the device once.
        received = torch.cat((pixels.flatten(), finite.to(torch.uint8)[None])).cpu().numpy()
        if not received[-1]:
            raise NonFinitePixels
        data: bytes = received[:-1].tobytes()
        return data

    def statistics(self) -> EngineStatistics:
        texts, rotaries = self._texts, self._rotaries
        caches = {"text": (texts.hits, texts.misses), "rotary": (rotaries.hits, rotaries.misses)}
        return EngineStatistics(caches, read_memory(self.device))

    def failure(self, error: Exception) -> str | None:
        """Out of memory and plain errors end the request; an error of the device makes the process unusable."""
        name = classify_failure(error, self.device)
        if name == "OutOfMemory":
            torch.cuda.empty_cache()
        return name
