import base64
import os

from agno.tools.openai import OpenAITools

os.environ["OPENAI_BASE_URL"] = "http://127.0.0.1:8000/v1"
tool = OpenAITools(api_key="not needed on loopback", image_model="flux/srpo")
for image in tool.generate_image("a red apple").images:
    print(base64.b64encode(image.content).decode())
