"""The FLUX step engine: diffusers' own components, our loop.

`FluxPipeline.__call__` draws one request from start to end; it cannot be interleaved, cancelled or watched. This
engine takes the same components through the same arithmetic one step at a time, in five verbs: encode, noise,
schedule, denoise, decode. With `acceleration: none` its pixels equal `FluxPipeline.__call__`'s bit for bit.
"""

from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps

from pipelines.acceleration import PRESETS, Mask
from pipelines.engine import EngineConfig, EngineInfo, Pixels, Report, Thumbnail
from pipelines.errors import NonFinitePixels
from pipelines.fingerprint import fingerprint
from pipelines.previews import draw_preview
from pipelines.request import ImageRequest
from pipelines.residual import Residuals, forward
from weights.checkpoints import CHECKPOINTS, locate
from weights.load import load_pipeline
from weights.previews import PreviewMap

TEXTS_KEPT = 64  # prompts whose embeddings are remembered: 4 MiB each at FLUX.1's size


@dataclass(frozen=True, slots=True)
class Text:
    """An encoded prompt: T5 states `(1, tokens, width)`, CLIP's pooled state `(1, width)`, ids `(tokens, 3)`."""

    states: torch.Tensor
    pooled: torch.Tensor
    ids: torch.Tensor
    notes: tuple[str, ...]


@dataclass(slots=True)
class Sample:
    """One image on its way. `latents` are packed, `(1, tokens, channels * 4)`; `step` counts the finished steps."""

    request: ImageRequest
    text: Text
    latents: torch.Tensor
    image_ids: torch.Tensor
    guidance: torch.Tensor | None
    scheduler: FlowMatchEulerDiscreteScheduler
    timesteps: torch.Tensor
    times: tuple[float, ...]  # the timesteps again, for arithmetic that must not wait for the device
    computed: Mask
    residuals: Residuals = field(default_factory=Residuals)
    step: int = 0
    velocity: torch.Tensor | None = None  # of the last step

    @property
    def clean(self) -> torch.Tensor | None:
        """The latents as they would be if the last velocity held to the end; None before the first step."""
        if self.velocity is None:
            return None
        left: torch.Tensor = self.scheduler.sigmas[self.step]
        return self.latents - left * self.velocity


class FluxEngine:
    """An `Engine` on a diffusers FLUX pipeline. One thread at a time."""

    def __init__(
        self, pipeline: FluxPipeline, text_tokens: int, info: EngineInfo, preview: PreviewMap | None = None
    ) -> None:
        self.info = info
        self._preview = preview
        self._pipeline = pipeline
        self._transformer = pipeline.transformer
        self._text_tokens = text_tokens
        self._device = pipeline.transformer.device
        self._texts: OrderedDict[str, Text] = OrderedDict()

    @torch.inference_mode()
    def prepare(self, request: ImageRequest) -> list[Sample]:
        text = self.encode(request.prompt)
        return [self.sample(request, text, seed) for seed in request.seeds]

    @torch.inference_mode()
    def step(self, samples: list[Sample]) -> None:
        for sample in samples:
            self.denoise(sample)

    @torch.inference_mode()
    def preview(self, sample: Sample, side: int) -> Thumbnail | None:
        return draw_preview(self._preview, sample.clean, sample.request, side) if self._preview else None

    @torch.inference_mode()
    def finish(self, sample: Sample) -> Pixels:
        return Pixels(self.decode(sample), sample.text.notes)

    def steps_left(self, sample: Sample) -> int:
        return len(sample.timesteps) - sample.step

    def sample(self, request: ImageRequest, text: Text, seed: int) -> Sample:
        latents, image_ids = self.noise(request.width, request.height, seed, text.states.dtype)
        scheduler, timesteps = self.schedule(request.num_inference_steps, tokens=latents.shape[1])
        guidance = None
        if self._transformer.config.guidance_embeds:
            guidance = torch.full([1], request.guidance_scale, device=self._device, dtype=torch.float32)
        times = tuple(timesteps.tolist())
        computed = PRESETS[request.acceleration](len(times))
        return Sample(request, text, latents, image_ids, guidance, scheduler, timesteps, times, computed)

    def encode(self, prompt: str) -> Text:
        """Both encoders' view of the prompt; the last few prompts are remembered."""
        if prompt in self._texts:
            self._texts.move_to_end(prompt)
            return self._texts[prompt]
        states, pooled, ids = self._pipeline.encode_prompt(
            prompt=prompt, prompt_2=None, device=self._device, max_sequence_length=self._text_tokens
        )
        self._texts[prompt] = text = Text(states, pooled, ids, self._notes(prompt))
        if len(self._texts) > TEXTS_KEPT:
            self._texts.popitem(last=False)
        return text

    def _notes(self, prompt: str) -> tuple[str, ...]:
        """Say when the prompt is longer than what the model reads; diffusers would cut it with only a log line."""
        tokens = len(self._pipeline.tokenizer_2(prompt, verbose=False).input_ids)
        if tokens <= self._text_tokens:
            return ()
        return (f"prompt: the model read the first {self._text_tokens} of {tokens} tokens",)

    def noise(self, width: int, height: int, seed: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Packed starting latents and their position ids. The generator is the CPU's: the same on every device."""
        generator = torch.Generator("cpu").manual_seed(seed)
        channels = self._transformer.config.in_channels // 4
        latents: torch.Tensor
        image_ids: torch.Tensor
        latents, image_ids = self._pipeline.prepare_latents(1, channels, height, width, dtype, self._device, generator)
        return latents, image_ids

    def schedule(self, steps: int, tokens: int) -> tuple[FlowMatchEulerDiscreteScheduler, torch.Tensor]:
        """This sample's own copy of the model's scheduler, and its timesteps `(steps,)`."""
        config = self._pipeline.scheduler.config
        scheduler = type(self._pipeline.scheduler).from_config(config)
        mu = calculate_shift(
            tokens,
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", 1.15),
        )
        sigmas = None if config.get("use_flow_sigmas") else np.linspace(1.0, 1 / steps, steps)
        timesteps, _ = retrieve_timesteps(scheduler, steps, self._device, sigmas=sigmas, mu=mu)
        scheduler.set_begin_index(0)
        return scheduler, timesteps

    def denoise(self, sample: Sample) -> None:
        """One step of one sample, computed or extrapolated as its mask says."""
        now = sample.timesteps[sample.step]
        inputs: dict[str, Any] = {
            "hidden_states": sample.latents,
            "timestep": now.expand(1).to(sample.latents.dtype) / 1000,  # cast first: bf16 rounds differently otherwise
            "guidance": sample.guidance,
            "pooled_projections": sample.text.pooled,
            "encoder_hidden_states": sample.text.states,
            "txt_ids": sample.text.ids,
            "img_ids": sample.image_ids,
        }
        if all(sample.computed):
            velocity = self._transformer(**inputs, joint_attention_kwargs={}, return_dict=False)[0]
        else:
            time, compute = sample.times[sample.step], sample.computed[sample.step]
            velocity = forward(self._transformer, sample.residuals, time, compute, **inputs)
        sample.latents = sample.scheduler.step(velocity, now, sample.latents, return_dict=False)[0]
        sample.velocity = velocity
        sample.step += 1

    def decode(self, sample: Sample) -> bytes:
        """8-bit RGB, `height * width * 3` bytes. Raises `NonFinitePixels`."""
        pipeline, request = self._pipeline, sample.request
        latents = pipeline._unpack_latents(sample.latents, request.height, request.width, pipeline.vae_scale_factor)
        latents = latents / pipeline.vae.config.scaling_factor + pipeline.vae.config.shift_factor
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


def load_engine(config: EngineConfig, report: Report) -> FluxEngine:
    """Build the engine a worker serves. Raises `WeightsError` where files are missing or wrong."""
    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()  # their warnings quote the prompt
        library.disable_progress_bar()
    report("reading the weights", 0.05)
    device = torch.device(choose_device(config.device))
    dtype = choose_dtype(config.dtype, device)
    located = locate(CHECKPOINTS[config.model], Path(config.models_dir))
    pipeline = load_pipeline(located, dtype, device, report)
    info = describe(located.checkpoint.id, pipeline, device, dtype)
    return FluxEngine(pipeline, located.checkpoint.text_tokens, info, located.checkpoint.preview)


def choose_device(name: str) -> str:
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def describe(model: str, pipeline: FluxPipeline, device: torch.device, dtype: torch.dtype) -> EngineInfo:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    precision = str(dtype).removeprefix("torch.")
    parts: dict[str, Any] = {
        key: getattr(pipeline, key) for key in ("transformer", "vae", "text_encoder", "text_encoder_2")
    }
    return EngineInfo(model, name, precision, fingerprint(name, precision, parts))
