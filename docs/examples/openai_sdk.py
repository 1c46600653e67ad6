"""Draw two pictures with OpenAI's SDK. What OpenAI's API does not have goes into `extra_body`."""

import base64
import os
from pathlib import Path

from openai import OpenAI

URL = os.environ.get("SRPO_URL", "http://127.0.0.1:8000")
client = OpenAI(base_url=f"{URL}/v1", api_key=os.environ.get("SRPO_KEY", "none"))

reply = client.images.generate(
    model="flux/srpo",
    prompt="a blue butterfly",
    n=2,
    size="512x512",
    response_format="b64_json",
    extra_body={"seed": 7, "num_inference_steps": 12, "acceleration": "none"},
)
for number, image in enumerate(reply.data or []):
    file = Path(f"butterfly-{number}.jpeg")
    file.write_bytes(base64.b64decode(image.b64_json or ""))
    print(file)
