cat > promptfooconfig.json <<'END'
{
  "prompts": ["a red apple", "a green apple"],
  "providers": [{
    "id": "openai:image:flux/srpo",
    "config": {"apiBaseUrl": "http://127.0.0.1:8000/v1", "apiKey": "none", "size": "1024x768"}
  }]
}
END
promptfoo eval --config promptfooconfig.json --no-cache --no-progress-bar --no-table --output results.json >&2
grep -oE 'https?://[^")]+/files/[^")]+' results.json | sort -u
