"""Who may call: API keys, hosts and origins."""
