"""All settings of `srpo serve`."""

from pydantic import model_validator

from server.settings.access import AccessSettings
from server.settings.engine import EngineSettings
from server.settings.faults import DamageSettings
from server.settings.limits import LimitSettings
from server.settings.metrics import LogSettings, MetricsSettings
from server.settings.replies import ReplySettings
from server.settings.storage import ReplicaSettings, StoreSettings
from server.settings.webhooks import WebhookSettings


class Settings(
    AccessSettings,
    EngineSettings,
    ReplySettings,
    LimitSettings,
    StoreSettings,
    ReplicaSettings,
    WebhookSettings,
    MetricsSettings,
    LogSettings,
    DamageSettings,
):
    """The server's settings."""

    # Each class above is a group in docs/configuration.md, by the first words of its docstring.

    @model_validator(mode="after")
    def _check_ports(self) -> "Settings":
        if self.metrics_port is not None and self.metrics_port == self.port:
            raise ValueError("metrics_port must differ from port; leave it out to serve metrics on the server's port")
        return self
