"""Begin at a picture instead of noise, with OpenAI's SDK: `python image_to_image.py [PICTURE]`."""

import base64
import os
import sys
from pathlib import Path

from openai import OpenAI

URL = os.environ.get("SRPO_URL", "http://127.0.0.1:8000")
client = OpenAI(base_url=f"{URL}/v1", api_key=os.environ.get("SRPO_KEY", "none"))

if len(sys.argv) > 1:
    source = Path(sys.argv[1])
else:
    drawn = client.images.generate(model="flux/srpo", prompt="a red apple", size="512x512", response_format="b64_json")
    source = Path("red.jpeg")
    source.write_bytes(base64.b64decode((drawn.data or [])[0].b64_json or ""))

edited = client.images.edit(
    model="flux/srpo",
    prompt="a green apple",
    image=source,
    response_format="b64_json",
    extra_body={"strength": 0.8},  # how much may change, from 0 to 1
)
file = Path("green.jpeg")
file.write_bytes(base64.b64decode((edited.data or [])[0].b64_json or ""))
print(f"{source} became {file}")
