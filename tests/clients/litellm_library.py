import litellm

for prefix in ("openai", "aiml"):
    reply = litellm.image_generation(
        model=f"{prefix}/flux/srpo",
        prompt="a red apple",
        size="1024x768",
        api_base="http://127.0.0.1:8000/v1",
        api_key="not needed on loopback",
    )
    assert reply.data
    print(reply.data[0].url)
