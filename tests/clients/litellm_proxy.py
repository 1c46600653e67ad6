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
Path("config.yaml").write_text(CONFIG)
with Path("proxy.log").open("w") as log:
    proxy = subprocess.Popen(
        ["litellm", "--config", "config.yaml", "--host", "127.0.0.1", "--port", "$FREE_PORT"], stdout=log, stderr=log
    )
try:
    client = OpenAI(base_url="http://127.0.0.1:$FREE_PORT/v1", api_key="none", max_retries=0)
    for _ in range(300):  # until the proxy answers
        try:
            client.models.list()
            break
        except APIConnectionError:
            time.sleep(1)
    drawn = client.images.generate(model="flux", prompt="a red apple", size="1024x768")
    print(drawn.data[0].url)
    edited = client.images.edit(model="flux", prompt="a green apple", image=Path("apple.png"))
    print(edited.data[0].url)
finally:
    proxy.terminate()
    proxy.wait()
