"""What the replies of OpenAI's gpt-image models have beside the images. Their clients show it, or count on it."""

from typing import Self

from pydantic import BaseModel, Field


class TokenDetails(BaseModel):
    """Tokens of the request. This server counts none."""

    image_tokens: int = 0
    text_tokens: int = 0


class TokenUsage(BaseModel):
    """The credits of a reply in OpenAI's words."""

    total_tokens: int
    input_tokens: int = 0
    output_tokens: int
    input_tokens_details: TokenDetails = TokenDetails()

    @classmethod
    def of(cls, credits_used: int) -> Self:
        return cls(total_tokens=credits_used, output_tokens=credits_used)


class DetailedReply(BaseModel):
    """Fields of a reply that are there only under a model's alias that is named like gpt-image models."""

    usage: TokenUsage | None = Field(None, description="The credits. Like the next three, only as gpt-image-*.")
    size: str | None = Field(None, description="WIDTHxHEIGHT of the images.")
    output_format: str | None = Field(None, description="Their format.")
    background: str | None = Field(None, description="Always opaque.")

    def with_details(self, size: tuple[int, int], output_format: str, credits_used: int) -> Self:
        """The same with these fields; `size` is width and height in pixels."""
        width, height = size
        details = {"size": f"{width}x{height}", "output_format": output_format, "background": "opaque"}
        return self.model_copy(update=details | {"usage": TokenUsage.of(credits_used)})
