import asyncio
import base64
from pathlib import Path

from pydantic_ai import BinaryImage, ImageGenerator
from pydantic_ai.images.openai import OpenAIImageGenerationModel
from pydantic_ai.providers.openai import OpenAIProvider

provider = OpenAIProvider(base_url="http://127.0.0.1:8000/v1", api_key="not needed on loopback")
generator = ImageGenerator(OpenAIImageGenerationModel("flux/srpo", provider=provider))
apple = BinaryImage(data=Path("apple.png").read_bytes(), media_type="image/png")


async def main() -> None:
    drawn = await generator.generate("a red apple")
    edited = await generator.generate("a green apple", images=[apple])
    for result in (drawn, edited):
        print(base64.b64encode(result.image.data).decode())


asyncio.run(main())
