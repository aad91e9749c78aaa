"""Datasets: built from labels or brought in, shown, compared, and written in other formats."""

from typing import Annotated, Final

from fastapi import APIRouter, Query, Request, Response, status
from pydantic import BaseModel, ConfigDict, Field

from rollout.api.limits import read_body
from rollout.api.security import ControlPlane, Reader, Trainer
from rollout.control import datasets
from rollout.control.access import require_route
from rollout.control.views import DatasetDifference
from rollout.datasets import Contradiction, Dropped, Manifest, Split
from rollout.formats import Format
from rollout.runs import TrainingRun

router = APIRouter(prefix="/datasets", tags=["datasets"])

IMPORT_PATH: Final = "/datasets/import"
# A proxy in between must not lose patience.
_LONGEST_WAIT: Final = 25.0

Wait = Annotated[float, Query(ge=0, le=_LONGEST_WAIT)]


class Shares(BaseModel):
    """Of the clusters of prompts, never trained on; what is not given is the trainer's default."""

    model_config = ConfigDict(extra="forbid")

    heldout: float | None = Field(None, ge=0, le=0.9)
    validation: float | None = Field(None, ge=0, le=0.9)


class Body(BaseModel):
    """With `wait_seconds` the answer comes when the dataset is built, or time is up."""

    model_config = ConfigDict(extra="forbid")

    route: str
    config: Shares = Field(default_factory=Shares)
    wait_seconds: float = Field(0.0, ge=0, le=_LONGEST_WAIT)


@router.post("", status_code=status.HTTP_202_ACCEPTED)
async def post_dataset(control: ControlPlane, caller: Trainer, body: Body) -> TrainingRun:
    """Ask a trainer to build one from the labels; the run's `dataset` names it once it is built."""
    require_route(caller, body.route)
    config = body.config.model_dump(exclude_none=True)
    return await datasets.build(control, caller, body.route, config, body.wait_seconds)


@router.post("/import", status_code=status.HTTP_202_ACCEPTED)
async def post_import(
    control: ControlPlane,
    caller: Trainer,
    request: Request,
    route: str,
    format: Format | None = None,  # the name in the query
    file: Annotated[str, Query(max_length=200)] = "a file",
    heldout: Annotated[float | None, Query(ge=0, le=0.9)] = None,
    validation: Annotated[float | None, Query(ge=0, le=0.9)] = None,
    wait_seconds: Wait = 0.0,
) -> TrainingRun:
    """Build one from a file's lines, by the same rules. A broken line refuses all of them."""
    shares = Shares(heldout=heldout, validation=validation)
    return await datasets.bring_in(
        control,
        caller,
        route,
        await read_body(request),
        name=format,
        file=file,
        config=shares.model_dump(exclude_none=True),
        wait_seconds=wait_seconds,
    )


@router.get("")
async def get_datasets(
    control: ControlPlane, caller: Reader, route: str | None = None
) -> list[Manifest]:
    return await datasets.datasets(control, caller, route)


@router.get("/{digest}", response_class=Response)
async def get_dataset(
    control: ControlPlane,
    caller: Trainer,
    digest: str,
    format: Format = "rows",  # the name in the query
    split: Split | None = None,
) -> Response:
    """The rows, one line of JSON each."""
    content = await datasets.lines(control, caller, digest, format, split)
    return Response(content, media_type="application/jsonl")


@router.get("/{digest}/manifest")
async def get_manifest(control: ControlPlane, caller: Reader, digest: str) -> Manifest:
    """What is in it, by counts."""
    return await datasets.manifest(control, caller, digest)


@router.get("/{digest}/dropped")
async def get_dropped(
    control: ControlPlane, caller: Reader, digest: str, reason: str | None = None
) -> list[Dropped]:
    """Each case that is not in it, and why; with `reason`, those whose reason has these words."""
    return list(await datasets.dropped(control, caller, digest, reason))


@router.get("/{digest}/contradictions")
async def get_contradictions(
    control: ControlPlane, caller: Trainer, digest: str
) -> list[Contradiction]:
    """Cases with the same input and different right answers."""
    return list(await datasets.contradictions(control, caller, digest))


@router.get("/{digest}/diff")
async def get_diff(
    control: ControlPlane, caller: Trainer, digest: str, after: str
) -> DatasetDifference:
    """What became of each of its rows in another dataset, `after`."""
    return await datasets.compare(control, caller, digest, after)
