"""OpenAI's shapes on the wire: read only what routing needs, keep every other byte."""

import re
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from gateway import shapes
from gateway.errors import PromptPlaceError
from gateway.shapes import Usage
from rollout.errors import InvalidInputError
from rollout.versions import Prompt, Version

CHAT: Final = "/v1/chat/completions"
COMPLETIONS: Final = "/v1/completions"
EMBEDDINGS: Final = "/v1/embeddings"
RESPONSES: Final = "/v1/responses"
INFERENCE_PATHS: Final = frozenset({CHAT, COMPLETIONS, EMBEDDINGS, RESPONSES})
# The only ones that know `stream_options`; a stream of /v1/responses ends with its usage anyway.
USAGE_ON_REQUEST: Final = frozenset({CHAT, COMPLETIONS})

# Elsewhere nothing is sampled, and an engine may refuse what it has no use for.
_SAMPLING: Final = frozenset({CHAT, COMPLETIONS, RESPONSES})
# Paths that an engine has at its root; OpenAI's clients put /v1 before everything.
_AT_ROOT: Final = frozenset({"/v1/tokenize", "/v1/detokenize", "/v1/pooling", "/v1/classify"})
# No segment begins with a dot, so no path leads out of /v1; whatever changes an engine is left out.
_PASSED: Final = re.compile(r"(?:/[A-Za-z0-9_-][A-Za-z0-9_.-]*)+")
_NEVER_PASSED: Final = frozenset({"/v1/load_lora_adapter", "/v1/unload_lora_adapter"})

_BOUNDARY: Final = re.compile(rb'(?i)multipart/form-data;.*?boundary="?([^\s";]{1,70})')
# Only the plainest way to name a part, so that the engine can't read another name than we do.
_PART_HEAD: Final = re.compile(
    rb'\r\n(?i:content-disposition): form-data; name="([^"\\\r\n]*)"'
    rb"(?:; filename\*?=[^;\\\r\n]*)*(?:\r\n(?i:content-(?:type|length)):[^\r\n]*)*\r\n\r\n"
)
_ASK_USAGE: Final = b'"stream_options":{"include_usage":true}'
_SPACE: Final = rb"[ \t\r\n]*"
_STRING: Final = rb'"[^"\\]*(?:\\.[^"\\]*)*"'
_MODEL_MEMBER: Final = re.compile(rb'"model"' + _SPACE + b":" + _SPACE + b"(" + _STRING + b")")
_MEMBER: Final = re.compile(_SPACE + b"(" + _STRING + b")" + _SPACE + b":" + _SPACE)
# Maybe a letter of `stream_options`, written as an escape.
_ESCAPED: Final = re.compile(rb"\\u00[567]")
_NEXT: Final = re.compile(_SPACE + b"([,}])")

Span = tuple[int, int]


class Request:
    """A client's body with what routing needs of it.

    `span` is where the value of `model` stands in `body`, quotes included; in a form there are
    none. `sticky` is what the client named as its own identity, if anything.
    """

    __slots__ = ("body", "form", "model", "span", "sticky", "stream", "wants_usage")

    def __init__(
        self,
        body: bytes,
        model: str,
        span: Span,
        *,
        stream: bool,
        wants_usage: bool,
        sticky: str | None,
        form: bool = False,
    ) -> None:
        self.body = body
        self.model = model
        self.span = span
        self.stream = stream
        self.wants_usage = wants_usage
        self.sticky = sticky
        self.form = form


def read_request(body: bytes) -> Request:
    """Read what routing needs. Raises InvalidInputError with what is wrong with the body."""
    fields = _decode_fields(body)
    if not fields.model:
        raise InvalidInputError(
            "you must provide a `model`: a route, or a version of it as in support-triage@7",
            param="model",
        )
    options = fields.stream_options
    return Request(
        body=body,
        model=fields.model,
        span=_model_span(body, fields.model),
        stream=bool(fields.stream),
        wants_usage=options is not None and bool(options.include_usage),
        sticky=fields.prompt_cache_key or fields.safety_identifier or fields.user,
    )


def render(request: Request, version: Version, path: str, *, ask_usage: bool = False) -> bytes:
    """The body to send to the engine that serves `version`.

    With `ask_usage` a stream is asked to end with its usage; whether the client asked for that is
    `request.wants_usage`.
    """
    ask = ask_usage and request.stream and not request.wants_usage and path in USAGE_ON_REQUEST
    if version.rewrites_body:
        if request.form:
            raise InvalidInputError(f"{version.name} carries a prompt or sampling, not for forms")
        return _rewrite(request, version, path, ask_usage=ask)
    return splice(request, msgspec.json.encode(version.served_name), ask_usage=ask)


def splice(request: Request, served: bytes, *, ask_usage: bool = False) -> bytes:
    """The client's body with `served`, a JSON string, for the value of `model`.

    All other bytes stay as they were, but for `stream_options` where usage is asked for.
    """
    body = request.body
    start, end = request.span
    if request.form:
        return b"".join((body[:start], shapes.string.decode(served).encode(), body[end:]))
    if not ask_usage:
        return b"".join((body[:start], served, body[end:]))
    if body.find(b"stream_options") < 0 and not _ESCAPED.search(body):
        first = body.index(b"{") + 1
        return b"".join((body[:first], _ASK_USAGE, b",", body[first:start], served, body[end:]))
    edits = [(request.span, served)]
    spans = member_spans(body)
    if (span := spans.get("stream_options")) is None:
        first = body.index(b"{") + 1
        edits.append(((first, first), _ASK_USAGE + b","))
    else:
        edits.append((span, _with_usage(body[span[0] : span[1]])))
    return _apply(body, edits)


def read_form(content_type: bytes, body: bytes) -> Request:
    """The same for a form, as clients send audio. Raises InvalidInputError."""
    boundary = _BOUNDARY.match(content_type)
    if boundary is None:
        raise InvalidInputError("the body is neither JSON nor a form")
    delimiter = b"\r\n--" + boundary[1]
    spans: list[Span] = []
    position = 0 if body.startswith(delimiter[2:]) else -1
    while position >= 0:
        begin = position + len(delimiter) - 2
        if body[begin : begin + 2] == b"--":
            break
        end = body.find(delimiter, begin)
        head = _PART_HEAD.match(body, begin)
        if end < 0 or head is None or head.end() > end:
            raise InvalidInputError("the form has a part that cannot be read")
        if head[1] == b"model":
            spans.append((head.end(), end))
        position = end + 2
    if len(spans) != 1:
        raise InvalidInputError("the form needs one field `model`", param="model")
    start, end = spans[0]
    model = body[start:end].decode("utf-8", "replace")
    return Request(body, model, spans[0], stream=False, wants_usage=False, sticky=None, form=True)


def passes(path: str) -> bool:
    """Whether a path that is none of ours is passed on to the engine, for a pinned version."""
    return (
        path.startswith("/v1/")
        and _PASSED.fullmatch(path) is not None
        and path not in _NEVER_PASSED
    )


def engine_path(path: str) -> str:
    """Where an engine has what a client asked for at `path`."""
    return path.removeprefix("/v1") if path in _AT_ROOT else path


def read_usage(body: bytes) -> Usage | None:
    """The usage of a whole answer, or None where it has none that can be read."""
    try:
        return shapes.whole.decode(body).usage
    except (msgspec.DecodeError, RecursionError):
        return None


def read_cap(body: bytes) -> int | None:
    """The most tokens that all answers together may take, where a body that was read before says."""
    try:
        caps = shapes.caps.decode(body)
    except (msgspec.DecodeError, RecursionError):
        return None
    for cap in (caps.max_completion_tokens, caps.max_tokens, caps.max_output_tokens):
        if isinstance(cap, int) and cap >= 0:
            return cap * (caps.n if isinstance(caps.n, int) and caps.n > 0 else 1)
    return None


def member_spans(body: bytes) -> dict[str, Span]:
    """Where the value of each member of the outermost object stands.

    Raises InvalidInputError where a name occurs twice: two readers could take different ones.
    """
    members = shapes.members.decode(body)
    position = body.index(b"{") + 1
    spans: dict[str, Span] = {}
    last = b","
    for name, raw in members.items():
        member = _MEMBER.match(body, position)
        value = bytes(raw)
        # The decoder keeps one member of each name, so a second one shows as a misfit here.
        if member is None or shapes.string.decode(member[1]) != name:
            raise _twice(body)
        start, end = member.end(), member.end() + len(value)
        after = _NEXT.match(body, end)
        if after is None or body[start:end] != value:
            raise _twice(body)
        spans[name] = (start, end)
        position, last = after.end(), after[1]
    if last != b"}" and members:
        raise _twice(body)
    return spans


def _decode_fields(body: bytes) -> shapes.Fields:
    try:
        if not body.isascii():
            body.decode()
        return shapes.fields.decode(body)
    except msgspec.ValidationError as exc:
        raise InvalidInputError(f"the body is not as it should be: {exc}", param=_at(exc)) from exc
    except msgspec.DecodeError as exc:
        raise InvalidInputError(f"the body is no valid JSON: {exc}") from exc
    except UnicodeDecodeError as exc:
        raise InvalidInputError(f"the body is no valid UTF-8: byte {exc.start}") from exc
    except RecursionError as exc:
        raise InvalidInputError("the body is nested too deeply") from exc


def _at(error: msgspec.ValidationError) -> str | None:
    """The field that msgspec complains of: it ends its message with "at `$.model`"."""
    _, found, path = str(error).partition("`$.")
    return path.rstrip("`") if found else None


def _model_span(body: bytes, model: str) -> Span:
    # The quick way: where `"model"` occurs once and no letter of it can be escaped elsewhere, it
    # is the member that the decoder has found. Inside a string its quotes would be escaped.
    found = body.find(b'"model"')
    once = found >= 0 and body.find(b'"model"', found + 1) < 0
    # `in` would be slower: it first tries whether it is asked for a number.
    if once and (body.find(b"\\") < 0 or body.find(b"\\u006") < 0):
        value = b'"' + model.encode() + b'"'
        for colon in (b'"model":', b'"model": '):
            start = found + len(colon)
            if body.startswith(value, start) and body.startswith(colon, found):
                return start, start + len(value)
        member = _MODEL_MEMBER.match(body, found)
        if member is not None:
            return member.span(1)
    return member_spans(body)["model"]


def _twice(body: bytes) -> InvalidInputError:
    model = body.count(b'"model"') > 1
    return InvalidInputError(
        "a name occurs twice in the body; send each field once", param="model" if model else None
    )


def _with_usage(options: bytes) -> bytes:
    return msgspec.json.encode(_asking(msgspec.json.decode(options)))


def _asking(options: dict[str, Any] | None) -> dict[str, Any]:
    """The client's options, asking for usage at the end of the stream and nowhere else."""
    asking = {**(options or {}), "include_usage": True}
    if "continuous_usage_stats" in asking:
        # Without `include_usage` vLLM does not heed it; with ours it would.
        asking["continuous_usage_stats"] = False
    return asking


def _apply(body: bytes, edits: list[tuple[Span, bytes]]) -> bytes:
    parts: list[bytes] = []
    position = 0
    for (start, end), replacement in sorted(edits):
        parts += (body[position:start], replacement)
        position = end
    parts.append(body[position:])
    return b"".join(parts)


def _rewrite(request: Request, version: Version, path: str, *, ask_usage: bool) -> bytes:
    """Re-encode the body with what the version carries: a prompt, sampling defaults."""
    try:
        body: dict[str, Any] = msgspec.json.decode(request.body)
    except (msgspec.DecodeError, RecursionError) as exc:
        # Numbers that no float can hold; they pass only where the body is not encoded anew.
        raise InvalidInputError(f"{version.name} cannot read the body: {exc}") from exc
    body["model"] = version.served_name
    if path in _SAMPLING:
        for name, value in version.sampling.items():
            body.setdefault(name, value)
    if version.prompt is not None:
        _put_prompt(body, version.prompt, version.name, path)
    if ask_usage:
        body["stream_options"] = _asking(body.get("stream_options"))
    return msgspec.json.encode(body)


def _put_prompt(body: dict[str, Any], prompt: Prompt, name: str, path: str) -> None:
    match path:
        case "/v1/chat/completions":
            body["messages"] = _with_prompt(body.get("messages"), prompt, "messages")
        case "/v1/responses":
            given = body.get("input")
            if isinstance(given, str):
                given = [{"role": "user", "content": given}]
            body["input"] = _with_prompt(given, prompt, "input")
            if prompt.mode == "replace_system":
                body.pop("instructions", None)
        case _:
            raise PromptPlaceError(
                f"{name} carries a prompt of messages: ask it at {CHAT} or {RESPONSES}"
            )


def _with_prompt(given: object, prompt: Prompt, param: str) -> list[Mapping[str, Any]]:
    if not isinstance(given, list):
        raise InvalidInputError(f"`{param}` must be a list of messages", param=param)
    if prompt.mode == "replace_system":
        given = [message for message in given if not _is_system(message)]
    return [*prompt.messages, *given]


def _is_system(message: object) -> bool:
    return isinstance(message, dict) and message.get("role") in ("system", "developer")
