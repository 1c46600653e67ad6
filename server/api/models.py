"""Which models this server answers to. `type` is `image`, since two clients filter on it."""

from typing import Literal

from fastapi import APIRouter, Depends
from pydantic import BaseModel

from server.api.dependencies import check_sent_key
from server.api.openapi import MODELS
from server.errors import NotFound
from server.schema import model_ids
from server.state import AppState, State
from weights.checkpoints import CHECKPOINTS

router = APIRouter(dependencies=[Depends(check_sent_key)])


class ModelInfo(BaseModel):
    """What a model is. `served_by` is the id of the weights that draw."""

    name: str
    served_by: str
    description: str
    licence: str
    knows: tuple[str, ...] | None = None  # a model that can draw only a few things names them
    ideas: tuple[str, ...] | None = None  # and has some prompts that show what it can do


class ModelCard(BaseModel):
    """One model, in OpenAI's form with the hosted API's `type` and `info`."""

    id: str
    object: Literal["model"] = "model"
    type: Literal["image"] = "image"
    created: int = 0
    owned_by: str = "self-hosted"
    info: ModelInfo

    @classmethod
    def of(cls, name: str, served: str) -> "ModelCard":
        row = CHECKPOINTS[served]
        info = ModelInfo(
            name=name,
            served_by=served,
            description=row.title,
            licence=row.licence,
            knows=row.subjects or None,
            ideas=row.ideas or None,
        )
        return cls(id=name, info=info)


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


def names_of(state: AppState) -> list[str]:
    """Everything that a request may call the loaded model."""
    return [*model_ids(state.served), *state.dialect.model_aliases]


@router.get("/v1/models", response_model_exclude_none=True, **MODELS)
@router.get("/v1/models/", response_model_exclude_none=True, include_in_schema=False)
@router.get("/models", response_model_exclude_none=True, include_in_schema=False)
@router.get("/models/", response_model_exclude_none=True, include_in_schema=False)
@router.head("/v1/models", response_model_exclude_none=True, include_in_schema=False)
async def list_models(state: State) -> ModelList:
    """The models this server answers to."""
    return ModelList(data=[ModelCard.of(name, state.served) for name in names_of(state)])


@router.get("/v1/models/{model:path}", response_model_exclude_none=True, **MODELS)
@router.get("/models/{model:path}", response_model_exclude_none=True, include_in_schema=False)
@router.head("/v1/models/{model:path}", response_model_exclude_none=True, include_in_schema=False)
async def get_model(state: State, model: str) -> ModelCard:
    """One model."""
    if model not in names_of(state):
        raise NotFound("There is no such model here.")
    return ModelCard.of(model, state.served)
