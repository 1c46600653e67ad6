"""Where Prometheus finds the metrics, and whether there are traces. Part of the settings."""

from pydantic import Field

from server.settings.types import EnvironmentSettings


class MetricsSettings(EnvironmentSettings):
    """Who may read the metrics, and whether requests are traced."""

    metrics: bool = Field(
        True, description="serve metrics for Prometheus at /metrics; where keys are needed, one with the scope metrics"
    )
    metrics_port: int | None = Field(
        None, ge=1, le=65535, description="a port of their own for the metrics, without a key; none: the server's port"
    )
    metrics_host: str = Field("127.0.0.1", description="address to listen on for metrics_port")
    traces: bool = Field(
        False,
        description="send traces of requests by OpenTelemetry (OTLP over HTTP; extra `otel`), as its OTEL_* variables "
        "say; by itself to http://localhost:4318",
    )
