"""Who is next, how long it will take, and when a refused client should come back. No torch, no process."""
