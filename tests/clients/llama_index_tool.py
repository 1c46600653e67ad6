import os

from llama_index.tools.openai.image_generation.base import OpenAIImageGenerationToolSpec

os.environ["OPENAI_BASE_URL"] = "http://127.0.0.1:8000/v1"
tool = OpenAIImageGenerationToolSpec(api_key="not needed on loopback")
print(tool.image_generation("a red apple", size="1024x1792"))
