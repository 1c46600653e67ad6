from haystack.components.generators import OpenAIImageGenerator
from haystack.utils import Secret

generator = OpenAIImageGenerator(
    model="flux/srpo",
    api_base_url="http://127.0.0.1:8000/v1",
    api_key=Secret.from_token("not needed on loopback"),
    size="1024x1536",
    timeout=600,
)
for image in generator.run("a red apple")["images"]:
    print(image)
