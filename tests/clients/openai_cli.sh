openai --api-base http://127.0.0.1:8000/v1/ --api-key none \
  api images.generate --model flux/srpo --prompt "a red apple" --size 1024x768 --response-format url |
  grep -oE 'https?://[^"]+' | head -1
