"""Where Prometheus finds the metrics, whether there are traces, and what the log is. Part of the settings."""

from typing import Literal

from pydantic import Field

from server.settings.types import COMMON, EnvironmentSettings, Port


class MetricsSettings(EnvironmentSettings):
    """Metrics and traces."""

    metrics: bool = Field(
        True, description="serve metrics for Prometheus at /metrics; where keys are needed, one with the scope metrics"
    )
    metrics_port: Port | None = Field(
        None,
        ge=1,
        le=65535,
        description="a port of their own for the metrics, without a key; none: the server's port",
        json_schema_extra=COMMON,
    )
    metrics_host: str = Field("127.0.0.1", description="address to listen on for metrics_port")
    traces: bool = Field(
        False,
        description="send traces of requests by OpenTelemetry (OTLP over HTTP; extra `otel`), as its OTEL_* variables "
        "say; by itself to http://localhost:4318",
    )


class LogSettings(EnvironmentSettings):
    """The log."""

    log_format: Literal["auto", "console", "json"] = Field(
        "auto", description="format of the log: console, json, or auto (console on a terminal, else json)"
    )
    log_prompts: bool = Field(False, description="write prompts to the log")
