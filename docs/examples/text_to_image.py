"""Draw a picture and save it, with `requests`."""

import os
import sys
from pathlib import Path

import requests

URL = os.environ.get("SRPO_URL", "http://127.0.0.1:8000")
HEADERS = {"Authorization": f"Bearer {os.environ.get('SRPO_KEY', 'none')}"}

response = requests.post(
    f"{URL}/v1/images/generations",
    headers=HEADERS,
    json={"model": "flux/srpo", "prompt": "two cats on a green background", "image_size": "square", "seed": 7},
    timeout=600,
)
reply = response.json()
if not response.ok:  # every failure has this form; 429 and 503 may be tried again after `retry-after` seconds
    sys.exit(f"{response.status_code} {reply['error']['code']}: {reply['message']}")

image = reply["images"][0]
file = Path(f"cats-{reply['seed']}.jpeg")
file.write_bytes(requests.get(image["url"], timeout=60).content)
print(f"{file}: {image['width']}x{image['height']}, drawn by {response.headers['x-served-model']}", end=" ")
print(f"in {reply['timings']['inference']:.1f} s")
