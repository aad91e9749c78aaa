"""LangChain in front of Sluice: only the base URL and the key are changed."""

import asyncio
import os
from typing import Literal

import openai
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

BASE = os.environ.get("GATEWAY", "http://127.0.0.1:8000") + "/v1"
ROUTE = os.environ.get("ROUTE", "review-triage")
QUESTION = "It broke on day one."


class Review(BaseModel):
    """What a review says."""

    sentiment: Literal["positive", "negative", "neutral"]


@tool
def rate(sentiment: Literal["positive", "negative", "neutral"]) -> str:
    """Note what a review says."""
    return sentiment


def model(**options: object) -> ChatOpenAI:
    given = {"model": ROUTE, "temperature": 0, "max_tokens": 400, "max_retries": 0} | options
    return ChatOpenAI(base_url=BASE, api_key=os.environ["KEY"], **given)


def invoke() -> None:
    answer = model(
        max_tokens=8,
        default_headers={"x-sluice-session": "ticket-4711"},
        include_response_headers=True,
    ).invoke([("system", "Answer with one word."), ("user", QUESTION)])
    assert answer.usage_metadata["output_tokens"] > 0
    headers = answer.response_metadata["headers"]
    assert headers["x-sluice-route"] == ROUTE
    print(f"  {headers['x-sluice-version']}: {answer.content}")


def stream() -> None:
    chunks = list(model(stream_usage=True, max_tokens=8).stream(QUESTION))
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    assert len(chunks) > 2
    assert whole.usage_metadata["output_tokens"] > 0
    assert all(not chunk.usage_metadata for chunk in model(max_tokens=8).stream(QUESTION))


def batch() -> None:
    answers = model(max_tokens=4).batch([QUESTION, "Fine.", "It works."])
    assert len(answers) == 3


def tools() -> None:
    # vLLM holds a tool to its parameters only where it is strict.
    bound = model().bind_tools([rate], tool_choice="rate", strict=True)
    assert bound.invoke(QUESTION).tool_calls[0]["args"]["sentiment"]
    chunks = list(bound.stream(QUESTION))
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    assert whole.tool_calls[0]["args"]["sentiment"]


def structured() -> None:
    for method in ("json_schema", "function_calling"):
        form = model().with_structured_output(Review, method=method, strict=True)
        answer = form.invoke(QUESTION)
        assert isinstance(answer, Review)


def responses() -> None:
    answer = model(use_responses_api=True, max_tokens=16).invoke(QUESTION)
    assert answer.usage_metadata["output_tokens"] > 0


def asynchronous() -> None:
    async def ask() -> None:
        one = model(max_tokens=8)
        answers = await asyncio.gather(one.ainvoke(QUESTION), one.ainvoke("Fine."))
        assert len(answers) == 2
        assert [chunk async for chunk in one.astream(QUESTION)]

    asyncio.run(ask())


def errors() -> None:
    refusals = {
        openai.NotFoundError: {"model": "nobody"},
        openai.BadRequestError: {"temperature": -5},
        openai.APITimeoutError: {
            "timeout": 0.1,
            "max_tokens": 300,
            "extra_body": {"ignore_eos": True},
        },
    }
    for kind, options in refusals.items():
        try:
            model(**options).invoke(QUESTION)
        except kind:
            continue
        raise AssertionError(f"{options} raised no {kind.__name__}")


def main() -> None:
    for step in (invoke, stream, batch, tools, structured, responses, asynchronous, errors):
        step()
        print(f"ok {step.__name__}")


if __name__ == "__main__":
    main()
