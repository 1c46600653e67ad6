"""Post a job, leave it, come back for its pictures: it is carried out once, whatever dies meanwhile."""

import os
import sys
import time
import uuid
from pathlib import Path

import requests

URL = os.environ.get("SRPO_URL", "http://127.0.0.1:8000")
session = requests.Session()
session.headers["Authorization"] = f"Bearer {os.environ.get('SRPO_KEY', 'none')}"

accepted = session.post(
    f"{URL}/v1/images/generations",
    headers={"Prefer": "respond-async", "Idempotency-Key": str(uuid.uuid4())},  # the same key again: the same job
    json={"model": "flux/srpo", "prompt": "a rocket", "image_size": "square", "num_images": 2},
    timeout=60,
)
accepted.raise_for_status()
job = accepted.json()
print(f"{job['id']}: about {job['eta_seconds']:.1f} s")

while job["status"] in ("queued", "running"):
    time.sleep(0.5)
    job = session.get(job["poll_url"], timeout=60).json()
if job["status"] != "succeeded":
    sys.exit(f"{job['status']}: {job.get('error')}")

for number, image in enumerate(job["reply"]["images"]):
    file = Path(f"rocket-{number}.jpeg")
    file.write_bytes(session.get(image["url"], timeout=60).content)
    print(file)
