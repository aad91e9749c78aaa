"""Rows without padding: nothing is lost, nothing mixes, what is shared is computed once."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.trainer.tiny import lora_parameters, rendered, trained_a_little
from trainer.base import BaseModel
from trainer.methods.likelihood import lengths, log_probabilities
from trainer.packing import Item, pack, plan_epoch
from trainer.rendering import Rendered


@pytest.fixture
def base(tiny_model_dir: Path) -> BaseModel:
    return BaseModel.open("tiny", tiny_model_dir)


def items(tokenizer: Any, instruction: str) -> list[Item]:
    return [Item((each,)) for each in rendered(tokenizer, 6, instruction=instruction)]


@given(
    st.lists(st.integers(1, 64), min_size=1, max_size=200),
    st.integers(64, 300),
    st.integers(1, 1000),
    st.integers(0, 5),
)
def test_every_example_is_in_one_row_and_no_row_overflows(
    lengths: list[int], row_tokens: int, batch_tokens: int, seed: int
) -> None:
    plan = plan_epoch(lengths, row_tokens=row_tokens, batch_tokens=batch_tokens, seed=seed, epoch=0)
    rows = [row for step in plan for row in step]
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in row) <= row_tokens for row in rows)
    assert all(step for step in plan)


def test_rows_are_well_filled() -> None:
    lengths = [17 + index % 40 for index in range(500)]
    plan = plan_epoch(lengths, row_tokens=512, batch_tokens=512, seed=0, epoch=0)
    rows = [row for step in plan for row in step]
    assert sum(lengths) / (512 * len(rows)) > 0.95


def test_each_epoch_has_its_own_order() -> None:
    plans = [
        plan_epoch([30] * 50, row_tokens=128, batch_tokens=128, seed=0, epoch=epoch)
        for epoch in (0, 1, 0)
    ]
    assert plans[0] == plans[2] != plans[1]


@pytest.mark.parametrize("instruction", ["", "Say whether it is warm, cold or mild. " * 3])
@pytest.mark.parametrize("share", [True, False])
def test_examples_packed_together_are_as_if_alone(
    base: BaseModel, tokenizer: Any, instruction: str, *, share: bool
) -> None:
    examples = items(tokenizer, instruction)
    model = trained_a_little(base)
    together = pack(examples, share=share)
    assert (together.mask is not None) == (share and bool(instruction))
    gradients = []
    found_so_far: list[torch.Tensor] = []
    for rows in ([together], [pack([each]) for each in examples]):
        model.zero_grad()
        found = torch.cat([log_probabilities(model, row) for row in rows])
        found.sum().backward()
        found_so_far.append(found.detach())
        gradients.append({n: each.grad.clone() for n, each in lora_parameters(model).items()})
    assert torch.allclose(found_so_far[0], found_so_far[1], atol=1e-4)
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], rtol=1e-3, atol=1e-4)


def test_a_shared_instruction_is_computed_once(tokenizer: Any) -> None:
    examples = items(tokenizer, "Say whether it is warm, cold or mild. " * 3)
    row = pack(examples)
    assert row.ids.shape[1] < row.tokens / 2 == pack(examples, share=False).ids.shape[1] / 2


def test_only_answers_have_targets(tokenizer: Any) -> None:
    first, second = rendered(tokenizer, 2)
    row = pack([Item((first,)), Item((second,))], share=False)
    assert tuple(row.targets.tolist()) == first.answer + second.answer
    assert row.ids[0, row.kept + 1].tolist() == row.targets.tolist()


def test_pairs_share_their_prompt_and_are_as_if_alone(base: BaseModel, tokenizer: Any) -> None:
    model = trained_a_little(base)
    one, two, three, four = rendered(tokenizer, 4)
    pairs = [
        Item((one, Rendered(one.prompt + two.answer, one.answer_start))),
        Item((three, Rendered(three.prompt + four.answer, three.answer_start))),
    ]
    together = pack(pairs)
    assert together.ids.shape[1] == sum(len(pair) for pair in pairs) < together.tokens
    with torch.no_grad():
        found = log_probabilities(model, together)
        alone = [log_probabilities(model, pack([Item((e,))])) for p in pairs for e in p.examples]
    assert torch.allclose(found, torch.cat(alone), atol=1e-4)
    assert lengths(together).tolist() == [len(each) for each in alone]


def test_what_has_no_weight_is_not_learnt(tokenizer: Any) -> None:
    example = rendered(tokenizer, 1)[0]
    weights = (0.5, *[0.0] * (len(example.answer) - 2), 1.0)
    row = pack([Item((Rendered(example.ids, example.answer_start, weights),))])
    assert row.weights.tolist() == [0.5, 1.0]
    assert row.targets.tolist() == [example.answer[0], example.answer[-1]]
