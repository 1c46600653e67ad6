"""Whether there are traces."""

from server.extras import missing_extra
from server.tracing.traces import Traces

INSTALL = missing_extra("SRPO_TRACES", "otel")


def open_traces(enabled: bool) -> Traces:
    """Traces to where the OTEL_* variables say. Raises `ValueError` if they cannot be made."""
    if not enabled:
        return Traces()
    try:
        from server.tracing.otel import OtelTraces
    except ImportError as error:
        raise ValueError(INSTALL) from error
    return OtelTraces()
