#!/usr/bin/env bash
# Draw a picture and save it. `sync_mode` puts the picture into the reply, as a data URI.
set -euo pipefail

url=${SRPO_URL:-http://127.0.0.1:8000}
curl --silent --show-error --fail-with-body "$url/v1/images/generations" \
  -H "Authorization: Bearer ${SRPO_KEY:-none}" \
  -H 'Content-Type: application/json' \
  -d '{"model": "flux/srpo", "prompt": "a snowman", "image_size": "square", "sync_mode": true}' |
  sed 's/.*"url":"data:image\/jpeg;base64,\([^"]*\)".*/\1/' |
  base64 --decode > snowman.jpeg
echo snowman.jpeg
