"""Where jobs may be reported to. Part of the settings."""

import re

from pydantic import Field, field_validator, model_validator

from server.settings.types import EnvironmentSettings, Names

ANY = "*"
HOST = re.compile(r"(\*\.)?[a-z0-9_-]+(\.[a-z0-9_-]+)*(:[0-9]{1,5})?|\[[0-9a-f:.]+\](:[0-9]{1,5})?")
SHORTEST = 24  # characters of a secret


class WebhookSettings(EnvironmentSettings):
    """Webhooks."""

    webhook_hosts: Names = Field(
        (),
        description="hosts that jobs may be reported to, separated by commas: hooks.example.com, *.example.com, "
        "hooks.example.com:8443, or * for any; none: a job's webhook_url is ignored",
    )
    webhook_private: bool = Field(
        False, description="let webhooks go to addresses that are not public; not together with webhook_hosts *"
    )
    webhook_secrets: Names = Field(
        (),
        description="secrets that the keys' webhook secrets follow from, separated by commas; all of them sign, so "
        "that a new one can take the place of an old one; none: one that is kept in the database",
    )

    @field_validator("webhook_hosts")
    @classmethod
    def _check_webhook_hosts(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for host in value:
            if host != ANY and not HOST.fullmatch(host):
                raise ValueError(f"{host!r}: expected a host name in lower case such as hooks.example.com, or *")
        return value

    @field_validator("webhook_secrets")
    @classmethod
    def _check_webhook_secrets(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if any(len(secret) < SHORTEST for secret in value):
            raise ValueError(f"a secret needs at least {SHORTEST} characters")
        return value

    @model_validator(mode="after")
    def _check_webhook_private(self) -> "WebhookSettings":
        if self.webhook_private and ANY in self.webhook_hosts:
            raise ValueError("webhook_private needs hosts by name in webhook_hosts: with * any client could reach them")
        return self
