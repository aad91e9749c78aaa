"""LlamaIndex in front of Sluice: only the base URL and the key are changed."""

import asyncio
import os
from typing import Literal

import openai
from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike

BASE = os.environ.get("GATEWAY", "http://127.0.0.1:8000") + "/v1"
ROUTE = os.environ.get("ROUTE", "review-triage")
QUESTION = "It broke on day one."
MESSAGES = [ChatMessage(role="user", content=QUESTION)]


def rate(sentiment: Literal["positive", "negative", "neutral"]) -> str:
    """Note what a review says."""
    return sentiment


RATE = FunctionTool.from_defaults(rate)


def model(**options: object) -> OpenAILike:
    given = {
        "model": ROUTE,
        "temperature": 0,
        "max_tokens": 400,
        "max_retries": 0,
        "is_chat_model": True,
        "is_function_calling_model": True,
    } | options
    return OpenAILike(api_base=BASE, api_key=os.environ["KEY"], **given)


def complete() -> None:
    """At /v1/completions, which is what a model that is no chat model is asked at."""
    llm = model(is_chat_model=False, is_function_calling_model=False, max_tokens=4)
    assert llm.complete("One, two,").raw.usage.completion_tokens > 0
    assert "".join(piece.delta for piece in llm.stream_complete("One, two,"))


def chat() -> None:
    answer = model(default_headers={"x-sluice-session": "ticket-4711"}, max_tokens=8).chat(MESSAGES)
    assert answer.raw.usage.completion_tokens > 0
    print(f"  {answer.message.content}")


def stream() -> None:
    pieces = list(model(max_tokens=8).stream_chat(MESSAGES))
    assert len(pieces) > 1
    assert pieces[-1].message.content == "".join(piece.delta or "" for piece in pieces)


def tools() -> None:
    # vLLM holds a tool to its parameters only where it is strict.
    llm = model(strict=True)
    answer = llm.chat_with_tools([RATE], user_msg=QUESTION, tool_choice="rate")
    [call] = llm.get_tool_calls_from_response(answer)
    assert call.tool_name == "rate"
    assert call.tool_kwargs["sentiment"]


def asynchronous() -> None:
    async def ask() -> None:
        llm = model(max_tokens=8)
        answers = await asyncio.gather(llm.achat(MESSAGES), llm.acomplete(QUESTION))
        assert len(answers) == 2
        assert [piece async for piece in await llm.astream_chat(MESSAGES)]

    asyncio.run(ask())


def errors() -> None:
    many = {
        "timeout": 0.1,
        "max_tokens": 300,
        "additional_kwargs": {"extra_body": {"ignore_eos": True}},
    }
    refusals = {
        openai.NotFoundError: {"model": "nobody"},
        openai.BadRequestError: {"additional_kwargs": {"top_p": -5}},
        openai.APITimeoutError: many,
    }
    for kind, options in refusals.items():
        try:
            model(**options).chat(MESSAGES)
        except kind:
            continue
        raise AssertionError(f"{options} raised no {kind.__name__}")


def main() -> None:
    for step in (complete, chat, stream, tools, asynchronous, errors):
        step()
        print(f"ok {step.__name__}")


if __name__ == "__main__":
    main()
