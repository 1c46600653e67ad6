from pathlib import Path

from openai import OpenAI

client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="not needed on loopback")
print([model.id for model in client.models.list()])

drawn = client.images.generate(model="flux/srpo", prompt="a red apple", n=2, size="1024x768")
assert drawn.data
for image in drawn.data:
    print(image.url)

edited = client.images.edit(
    model="flux/srpo", prompt="a green apple", image=Path("apple.png"), extra_body={"strength": 0.8}
)
assert edited.data
print(edited.data[0].url)
