import asyncio

from openai import AsyncOpenAI
from semantic_kernel.connectors.ai.open_ai import OpenAITextToImage

client = AsyncOpenAI(base_url="http://127.0.0.1:8000/v1", api_key="not needed on loopback")
service = OpenAITextToImage(ai_model_id="flux/srpo", async_client=client)


async def main() -> None:
    for image in await service.generate_images("a red apple", size={"width": 1792, "height": 1024}):
        print(image)
    for image in await service.edit_image("a green apple", image_paths=["apple.png"]):
        print(image)


asyncio.run(main())
