"""Whether there are traces."""

from server.tracing.traces import Traces


def open_traces(enabled: bool) -> Traces:
    """Traces to where the OTEL_* variables say. Raises `ValueError` if they cannot be made."""
    if not enabled:
        return Traces()
    try:
        from server.tracing.otel import OtelTraces
    except ImportError as error:
        raise ValueError(f"SRPO_TRACES needs the extra otel, which is not installed ({error.name})") from error
    return OtelTraces()
