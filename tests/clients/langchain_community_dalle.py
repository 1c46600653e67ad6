from langchain_community.utilities.dalle_image_generator import DallEAPIWrapper

tool = DallEAPIWrapper(
    base_url="http://127.0.0.1:8000/v1", api_key="not needed on loopback", model="flux/srpo", n=2, size="1024x1792"
)
print(tool.run("a red apple"))
