"""Which trace the work under way belongs to, as the headers that say so (W3C Trace Context); empty without one.

Whoever calls a service of the operator's sends them along. `server.tracing` sets them.
"""

from collections.abc import Mapping
from contextvars import ContextVar
from types import MappingProxyType

trace_context: ContextVar[Mapping[str, str]] = ContextVar("trace_context", default=MappingProxyType({}))
