"""Open WebUI's own server, set up by its environment; then its image routes are called as its pages call them."""

import base64
import os
import subprocess
import time
from pathlib import Path

import httpx

BASE, PORT = "http://127.0.0.1:8000/v1", "4000"
IMAGES = {
    "ENABLE_IMAGE_GENERATION": "true",
    "IMAGE_GENERATION_ENGINE": "openai",
    "IMAGE_GENERATION_MODEL": "flux/srpo",
    "IMAGE_SIZE": "1024x768",
    "IMAGES_OPENAI_API_BASE_URL": BASE,
    "IMAGES_OPENAI_API_KEY": "not needed on loopback",
    "ENABLE_IMAGE_EDIT": "true",
    "IMAGE_EDIT_ENGINE": "openai",
    "IMAGE_EDIT_MODEL": "flux/srpo",
    "IMAGES_EDIT_OPENAI_API_BASE_URL": BASE,
    "IMAGES_EDIT_OPENAI_API_KEY": "not needed on loopback",
}
OFFLINE = {
    "OFFLINE_MODE": "true",
    "HF_HUB_OFFLINE": "1",
    "DATA_DIR": str(Path("data").absolute()),
    "USE_SLIM_DOCKER": "true",
}
LOGIN = {"WEBUI_AUTH": "False", "WEBUI_SECRET_KEY": "for this test", "ENABLE_OLLAMA_API": "false"}

with Path("server.log").open("w") as log:
    server = subprocess.Popen(
        ["open-webui", "serve", "--host", "127.0.0.1", "--port", PORT],
        env=os.environ | IMAGES | OFFLINE | LOGIN,
        stdout=log,
        stderr=log,
    )
try:
    with httpx.Client(base_url=f"http://127.0.0.1:{PORT}", timeout=600) as client:
        while True:  # until it answers
            if server.poll() is not None:
                raise RuntimeError(f"error: it ended: {Path('server.log').read_text()[-1500:]}")
            try:
                client.get("/health").raise_for_status()
                break
            except httpx.HTTPError:
                time.sleep(1)
        login = client.post("/api/v1/auths/signin", json={"email": "", "password": ""}).raise_for_status().json()
        client.headers["authorization"] = f"Bearer {login['token']}"
        drawn = client.post("/api/v1/images/generations", json={"prompt": "a red apple"}).raise_for_status().json()
        links = [image["url"] for image in drawn]
        body = {"prompt": "a green apple", "image": [*links, *links]}
        links += [image["url"] for image in client.post("/api/v1/images/edit", json=body).raise_for_status().json()]
        for link in links:
            print(base64.b64encode(client.get(link).raise_for_status().content).decode())
finally:
    server.terminate()
    server.wait()
