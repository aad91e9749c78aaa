"""The API's reference, drawn from its own OpenAPI description."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import Response

from rollout.console.page import templates

router = APIRouter(include_in_schema=False)


@dataclass(frozen=True, slots=True)
class Field:
    name: str
    kind: str
    required: bool


@dataclass(frozen=True, slots=True)
class Operation:
    method: str
    path: str
    summary: str
    parameters: tuple[Field, ...]
    body: tuple[Field, ...]
    body_note: str
    answer: str


@router.get("/docs")
async def get_docs(request: Request) -> Response:
    app: FastAPI = request.app
    description = app.openapi()
    groups: dict[str, list[Operation]] = {}
    for tag, operation in _operations(description):
        groups.setdefault(tag, []).append(operation)
    return templates.TemplateResponse(request, "docs.html", {"groups": groups})


def _operations(description: Mapping[str, Any]) -> Iterator[tuple[str, Operation]]:
    schemas = description.get("components", {}).get("schemas", {})
    for path, methods in description["paths"].items():
        for method, entry in methods.items():
            body = _body_schema(entry, schemas)
            yield (
                entry["tags"][0],
                Operation(
                    method=method.upper(),
                    path=path,
                    summary=entry.get("description", ""),
                    parameters=tuple(
                        Field(each["name"], _kind(each["schema"]), each.get("required", False))
                        for each in entry.get("parameters", ())
                    ),
                    body=_fields(body),
                    body_note=body.get("description", ""),
                    answer=_answer(entry),
                ),
            )


def _body_schema(entry: Mapping[str, Any], schemas: Mapping[str, Any]) -> Mapping[str, Any]:
    content = entry.get("requestBody", {}).get("content", {})
    schema = content.get("application/json", {}).get("schema", {})
    found: Mapping[str, Any] = schemas.get(_name(schema), schema)
    return found


def _fields(schema: Mapping[str, Any]) -> tuple[Field, ...]:
    required = schema.get("required", ())
    return tuple(
        Field(name, _kind(each), name in required)
        for name, each in schema.get("properties", {}).items()
    )


def _answer(entry: Mapping[str, Any]) -> str:
    for code, response in entry["responses"].items():
        if code.startswith("2"):
            content = response.get("content", {}).get("application/json", {})
            return f"{code} {_kind(content['schema'])}" if content.get("schema") else str(code)
    return ""


def _kind(schema: Mapping[str, Any]) -> str:
    if "$ref" in schema:
        return _name(schema)
    if "anyOf" in schema:
        return " | ".join(_kind(each) for each in schema["anyOf"])
    if "enum" in schema:
        return " | ".join(str(each) for each in schema["enum"])
    if schema.get("type") == "array":
        return f"[{_kind(schema.get('items', {}))}]"
    return str(schema.get("type", "any"))


def _name(schema: Mapping[str, Any]) -> str:
    return str(schema.get("$ref", "")).rpartition("/")[2]
