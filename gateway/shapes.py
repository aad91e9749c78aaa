"""OpenAI's shapes as they are decoded: of each body no more than the gateway needs."""

from typing import Annotated, Final

import msgspec


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class Fields(msgspec.Struct):
    """What routing needs of a request."""

    model: str = ""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    user: str | None = None


class Caps(msgspec.Struct):
    """What bounds an answer, on any of the endpoints; the engine refuses what is no number."""

    max_completion_tokens: object = None
    max_tokens: object = None
    max_output_tokens: object = None
    n: object = None


# What an engine says; a counter takes nothing less than nothing.
_Count = Annotated[int, msgspec.Meta(ge=0)]


class Usage(msgspec.Struct):
    """Tokens, in the words of either API."""

    prompt_tokens: _Count = 0
    completion_tokens: _Count = 0
    input_tokens: _Count = 0
    output_tokens: _Count = 0

    @property
    def prompt(self) -> int:
        return self.prompt_tokens or self.input_tokens

    @property
    def completion(self) -> int:
        return self.completion_tokens or self.output_tokens


class Whole(msgspec.Struct):
    """Of a whole answer, its usage."""

    usage: Usage | None = None


class Tail(msgspec.Struct):
    """What the last events of a stream may say, on any of the endpoints."""

    choices: list[msgspec.Raw] | None = None
    usage: Usage | None = None
    error: object = None
    type: str | None = None
    response: Whole | None = None


class PlainDelta(msgspec.Struct, forbid_unknown_fields=True):
    """A piece of an answer that is words and nothing else."""

    role: str | None = None
    content: str | None = None
    refusal: None = None
    tool_calls: None = None
    function_call: None = None
    reasoning: None = None
    reasoning_content: None = None


class PlainChoice(msgspec.Struct, forbid_unknown_fields=True):
    delta: PlainDelta
    index: int = 0
    finish_reason: str | None = None
    stop_reason: object = None
    logprobs: None = None
    token_ids: None = None


class PlainPiece(msgspec.Struct):
    """An event of a chat's stream that holds only words."""

    choices: list[PlainChoice]
    usage: None = None
    error: None = None
    type: None = None


fields: Final = msgspec.json.Decoder(Fields)
caps: Final = msgspec.json.Decoder(Caps)
whole: Final = msgspec.json.Decoder(Whole)
tail: Final = msgspec.json.Decoder(Tail)
plain_piece: Final = msgspec.json.Decoder(PlainPiece)
members: Final = msgspec.json.Decoder(dict[str, msgspec.Raw])
string: Final = msgspec.json.Decoder(str)
