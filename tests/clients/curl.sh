reply=$(curl -s http://127.0.0.1:8000/v1/images/generations \
  -H 'Content-Type: application/json' \
  -d '{"model": "flux/srpo", "prompt": "a red apple", "num_inference_steps": 8}')
echo "$reply" | grep -oE '"url": *"[^"]+"' | head -1 | cut -d'"' -f4
