"""Save previews of a picture while it is drawn, then the picture itself, with OpenAI's SDK."""

import base64
import os
from pathlib import Path

from openai import OpenAI

URL = os.environ.get("SRPO_URL", "http://127.0.0.1:8000")
client = OpenAI(base_url=f"{URL}/v1", api_key=os.environ.get("SRPO_KEY", "none"))

events = client.images.generate(
    model="flux/srpo", prompt="a castle", size="512x512", stream=True, partial_images=2, response_format="b64_json"
)
for event in events:
    if event.type == "image_generation.partial_image":  # a blurred thumbnail: the image has not been checked yet
        file = Path(f"castle-preview-{event.partial_image_index}.jpeg")
    elif event.type == "image_generation.completed":
        file = Path("castle.jpeg")
    else:
        continue
    file.write_bytes(base64.b64decode(event.b64_json))
    print(file)
