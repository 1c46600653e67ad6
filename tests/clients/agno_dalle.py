import os

from agno.tools.dalle import DalleTools

os.environ["OPENAI_BASE_URL"] = "http://127.0.0.1:8000/v1"
tool = DalleTools(api_key="not needed on loopback", size="1024x1792")
for image in tool.create_image("a red apple").images:
    print(image.url)
