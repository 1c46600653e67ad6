"""Traces of requests, for whoever has an OpenTelemetry collector. Off, nothing of OpenTelemetry's SDK is loaded."""
