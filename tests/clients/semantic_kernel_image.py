import asyncio

from openai import AsyncOpenAI
from semantic_kernel.connectors.ai.open_ai import OpenAITextToImage, OpenAITextToImageExecutionSettings

client = AsyncOpenAI(base_url="http://127.0.0.1:8000/v1", api_key="not needed on loopback")
service = OpenAITextToImage(ai_model_id="flux/srpo", async_client=client)
wide = OpenAITextToImageExecutionSettings(width=1792, height=1024)


async def main() -> None:
    for image in await service.generate_images("a red apple", wide):
        print(image)
    for image in await service.edit_image("a green apple", image_paths=["apple.png"]):
        print(image)


asyncio.run(main())
