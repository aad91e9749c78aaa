"""What is learnt is the answer and its stop token, and what is seen is what serving renders."""

from typing import Any

import pytest

from rollout.versions import Prompt
from trainer.rendering import MaskError, TooLongError, render, render_prompt, with_prompt

ASK = [{"role": "user", "content": "red or blue?"}]


def rendered(tokenizer: Any, answer: Any = "red", **changes: Any) -> Any:
    limits = {"stops": frozenset({tokenizer.eos_token_id}), "max_length": 128}
    return render(tokenizer, ASK, answer, **{**limits, **changes})


def with_template(tokenizer: Any, template: str) -> Any:
    import copy

    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    return other


def test_the_answer_and_its_stop_token_are_learnt_and_nothing_else(tokenizer: Any) -> None:
    example = rendered(tokenizer)
    assert tokenizer.decode(example.answer) == "red<|im_end|>"
    assert example.prompt == render_prompt(tokenizer, ASK)
    assert tokenizer.decode(example.prompt).endswith("<|im_start|>assistant\n")


def test_a_template_that_never_stops_is_refused(tokenizer: Any) -> None:
    endless = with_template(
        tokenizer,
        "{% for m in messages %}{{ m['role'] }}\n{{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant\n{% endif %}",
    )
    with pytest.raises(MaskError, match="stop token would not be trained"):
        rendered(endless)


def test_a_stop_token_that_generation_does_not_know_is_refused(tokenizer: Any) -> None:
    with pytest.raises(MaskError, match="stop token would not be trained"):
        rendered(tokenizer, stops=frozenset({0}))


def test_a_prompt_that_serving_renders_differently_is_refused(tokenizer: Any) -> None:
    different = with_template(
        tokenizer,
        "{% if add_generation_prompt %}Answer in one word. {% endif %}"
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|im_end|>{% endfor %}",
    )
    with pytest.raises(MaskError, match="renders the prompt differently"):
        rendered(different)


def test_a_template_that_changes_the_answer_is_refused(tokenizer: Any) -> None:
    changing = with_template(
        tokenizer,
        "{% for m in messages %}{{ m['role'] }}\n{{ m['content'] | upper }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant\n{% endif %}",
    )
    with pytest.raises(MaskError, match="changes the answer"):
        rendered(changing)


def test_an_empty_answer_is_refused(tokenizer: Any) -> None:
    with pytest.raises(MaskError, match="mask is empty"):
        rendered(tokenizer, answer="")


def test_a_template_that_raises_is_explained(tokenizer: Any) -> None:
    strict = with_template(tokenizer, "{{ raise_exception('no users here') }}")
    with pytest.raises(MaskError, match="no users here"):
        rendered(strict)


def test_an_answer_is_never_cut(tokenizer: Any) -> None:
    with pytest.raises(TooLongError):
        rendered(tokenizer, max_length=len(rendered(tokenizer).ids) - 1)


def test_a_version_brings_its_prompt_as_the_gateway_puts_it() -> None:
    system = {"role": "system", "content": "the client's"}
    own = {"role": "system", "content": "the version's"}
    assert with_prompt([system, *ASK], None) == [system, *ASK]
    assert with_prompt([system, *ASK], Prompt((own,))) == [own, system, *ASK]
    assert with_prompt([system, *ASK], Prompt((own,), "replace_system")) == [own, *ASK]


TOOLS = [
    {
        "type": "function",
        "function": {"name": "refund", "parameters": {"type": "object", "properties": {}}},
    }
]
# ChatML as Qwen writes it, with tools and calls.
WITH_TOOLS = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "{% for call in m.tool_calls or [] %}<call>{{ call.function.name }} "
    "{{ call.function.arguments | tojson }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def called(arguments: Any) -> Any:
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": "1",
                "type": "function",
                "function": {"name": "refund", "arguments": arguments},
            }
        ],
    }


def test_earlier_answers_are_learnt_by_their_weight(tokenizer: Any) -> None:
    said: list[dict[str, Any]] = [
        {"role": "user", "content": "red?"},
        {"role": "assistant", "content": "warm", "weight": 0.5},
        {"role": "user", "content": "blue?"},
        {"role": "assistant", "content": "cold", "weight": 0},
        {"role": "user", "content": "green?"},
    ]
    example = render(
        tokenizer, said, "mild", stops=frozenset({tokenizer.eos_token_id}), max_length=128
    )
    learnt = list(example.learnt())
    text = tokenizer.decode([example.ids[place] for place, _ in learnt])
    assert text == "warm<|im_end|>mild<|im_end|>"
    assert {weight for _, weight in learnt} == {0.5, 1.0}
    assert tokenizer.decode(example.prompt).endswith("red?<|im_end|>\n<|im_start|>assistant\n")


def test_a_conversation_in_which_nothing_counts_is_refused(tokenizer: Any) -> None:
    with pytest.raises(MaskError, match="weight 0"):
        rendered(tokenizer, answer={"role": "assistant", "content": "red", "weight": 0})


@pytest.mark.parametrize("weight", [-1, "much", True, float("nan")])
def test_a_weight_that_is_none_is_refused(tokenizer: Any, weight: Any) -> None:
    with pytest.raises(MaskError, match="weight"):
        rendered(tokenizer, answer={"role": "assistant", "content": "red", "weight": weight})


@pytest.mark.parametrize("arguments", ['{"order": 7}', {"order": 7}])
def test_a_tool_call_is_learnt_as_the_engine_would_render_it(
    tokenizer: Any, arguments: Any
) -> None:
    calling = with_template(tokenizer, WITH_TOOLS)
    example = rendered(calling, answer=called(arguments), tools=TOOLS)
    assert calling.decode(example.answer) == '<call>refund {"order": 7}</call><|im_end|>'
    assert example.prompt == render_prompt(calling, ASK, TOOLS)
    assert "refund" in calling.decode(example.prompt)


def test_a_template_that_leaves_tool_calls_out_is_refused(tokenizer: Any) -> None:
    with pytest.raises(MaskError, match=r"mask is empty|leaves out"):
        rendered(tokenizer, answer=called('{"order": 7}'))


def test_arguments_that_are_no_json_are_refused(tokenizer: Any) -> None:
    calling = with_template(tokenizer, WITH_TOOLS)
    with pytest.raises(MaskError, match="no JSON"):
        rendered(calling, answer=called("{order"), tools=TOOLS)
