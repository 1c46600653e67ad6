"""Who may use the API: keys, host names and origins."""
