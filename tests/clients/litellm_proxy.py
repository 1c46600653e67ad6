import os
import secrets
import subprocess
import time
from pathlib import Path

from openai import APIConnectionError, OpenAI

CONFIG = """
model_list:
  - model_name: flux
    litellm_params:
      model: openai/flux/srpo
      api_base: http://127.0.0.1:8000/v1
      api_key: not-needed-on-loopback
"""
KEY = f"sk-{secrets.token_hex(24)}"  # the proxy's own
Path("config.yaml").write_text(CONFIG)
with Path("proxy.log").open("w") as log:
    proxy = subprocess.Popen(
        ["litellm", "--config", "config.yaml", "--host", "127.0.0.1", "--port", "4000"],
        env=os.environ | {"LITELLM_MASTER_KEY": KEY},
        stdout=log,
        stderr=log,
    )
try:
    client = OpenAI(base_url="http://127.0.0.1:4000/v1", api_key=KEY, max_retries=0)
    while True:  # until the proxy answers
        if proxy.poll() is not None:
            raise RuntimeError(f"error: the proxy ended: {Path('proxy.log').read_text()[-1500:]}")
        try:
            client.models.list()
            break
        except APIConnectionError:
            time.sleep(1)
    drawn = client.images.generate(model="flux", prompt="a red apple", size="1024x768")
    assert drawn.data
    print(drawn.data[0].url)
    edited = client.images.edit(model="flux", prompt="a green apple", image=Path("apple.png"))
    assert edited.data
    print(edited.data[0].url)
finally:
    proxy.terminate()
    proxy.wait()
