"""The tiny model behind the step engine, in this process."""

from pathlib import Path

import support.convolution  # noqa: F401
import torch
from support.written_formats import Tensors

from pipelines.engine.base import EngineConfig
from pipelines.engine.flux import FluxEngine
from pipelines.engine.options import EngineOptions
from pipelines.loading.build import describe_engine, load_engine
from pipelines.request import GenerationParams, ImageRequest
from weights import tiny

DTYPES = [torch.float32, torch.bfloat16]


def tiny_engine(dtype: torch.dtype) -> FluxEngine:
    pipeline = tiny.build(dtype)
    info = describe_engine("tiny", pipeline, torch.device("cpu"), dtype)
    return FluxEngine(pipeline, EngineOptions(info, tiny.TEXT_TOKENS))


def ask(width: int = 512, height: int = 512, steps: int = 2, **fields: object) -> ImageRequest:
    size = {"width": width, "height": height}
    body = {"prompt": "a red apple", "acceleration": "none", "image_size": size, "num_inference_steps": steps}
    return GenerationParams.model_validate(body | fields).to_request("tiny")


def draw(engine: FluxEngine, request: ImageRequest) -> list[bytes]:
    samples = engine.prepare(request)
    for sample in samples:
        while engine.steps_left(sample):
            engine.step([sample])
    return [engine.finish(sample).data for sample in samples]


def engine_with(file: Path | None = None, *loras: str, dtype: str = "float32") -> FluxEngine:
    config = EngineConfig("tiny", device="cpu", dtype=dtype, transformer=str(file) if file else None, loras=loras)
    engine = load_engine(config, lambda *_: None)
    assert isinstance(engine, FluxEngine)
    return engine


def weights_of(engine: FluxEngine) -> Tensors:
    found: Tensors = engine._transformer.state_dict()
    return found
