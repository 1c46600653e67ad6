"""Requests to the scripted engine, and what it draws."""

from pipelines.request import GenerationParams, ImageRequest


def ask(prompt: str = "a cat", steps: int = 2, **fields: object) -> ImageRequest:
    body = {"prompt": prompt, "image_size": "square", "seed": 7} | fields
    request = GenerationParams.model_validate(body).to_request("scripted")
    return ImageRequest.from_json(request.to_json() | {"num_inference_steps": steps})


def picture(seed: int) -> bytes:
    return bytes([seed]) * (512 * 512 * 3)
