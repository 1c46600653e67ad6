"""What image files are like. Part of the settings."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from server.settings.types import EnvironmentSettings


class FileSettings(EnvironmentSettings):
    """Image files."""

    jpeg_quality: int = Field(95, ge=1, le=100, description="quality of JPEG and WebP files, 1 to 100")
    omit_parameters: bool = Field(
        False,
        description="write no prompt, seed or other parameter into image files; the mark that a model made them stays",
    )
    c2pa_certificate: Path | None = Field(
        None, description="PEM file with your certificate chain, leaf first; with it, image files are signed (C2PA)"
    )
    c2pa_key: Path | None = Field(None, description="PEM file with the private key of the certificate")
    c2pa_algorithm: Literal["es256", "es384", "es512", "ps256", "ps384", "ps512", "ed25519"] = Field(
        "es256", description="signature algorithm of the private key"
    )

    @model_validator(mode="after")
    def _check_certificate(self) -> Self:
        if (self.c2pa_certificate is None) != (self.c2pa_key is None):
            raise ValueError("C2PA needs both SRPO_C2PA_CERTIFICATE and SRPO_C2PA_KEY")
        return self
