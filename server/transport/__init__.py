"""Bytes on a connection: HTTP as it arrives, the bodies of requests, event streams, and the outermost middleware."""
