import json
import os

from crewai_tools import DallETool

os.environ["OPENAI_BASE_URL"] = "http://127.0.0.1:8000/v1"
os.environ["OPENAI_API_KEY"] = "not needed on loopback"
tool = DallETool(model="flux/srpo", size="1792x1024")
print(json.loads(tool.run(image_description="a red apple"))["image_url"])
