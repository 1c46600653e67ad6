import requests

reply = requests.post(
    "http://127.0.0.1:8000/v1/images/generations",
    json={"model": "flux/srpo", "prompt": "a red apple", "image_size": {"width": 1440, "height": 512}},
    timeout=600,
)
reply.raise_for_status()
for image in reply.json()["images"]:
    print(image["url"])
