"""What the server's process needs: threads, memory given back, an event loop on time, and a folder of its own."""
