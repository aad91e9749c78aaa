"""The loop on a tiny model: packing that doesn't mix, a loss that falls, a run that resumes."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rollout.adapters import check_adapter
from tests.trainer.samples import sentences
from trainer import loop
from trainer.adapter import save_adapter
from trainer.base import BaseModel
from trainer.config import TrainingConfig
from trainer.loop import Checkpointing, DivergedError, Progress, StoppedError, schedule
from trainer.methods import sft
from trainer.packing import pack, plan_epoch
from trainer.rendering import Rendered, render

CPU = torch.device("cpu")


@pytest.fixture
def base(tiny_model_dir: Path) -> BaseModel:
    return BaseModel.open("tiny", tiny_model_dir)


@pytest.fixture(scope="session")
def examples(tokenizer: Any) -> list[Rendered]:
    return [
        render(
            tokenizer,
            row.case.messages,
            row.case.stable.text,
            stops=frozenset({tokenizer.eos_token_id}),
            max_length=128,
        )
        for row in sentences(24)
    ]


def config(**changes: Any) -> TrainingConfig:
    return TrainingConfig.from_mapping({"row_tokens": 128, "max_length": 128, **changes})


def fresh(base: BaseModel, settings: TrainingConfig) -> Any:
    model, _ = loop.load_base(base, CPU, torch.float32)
    return loop.add_adapter(model, settings)


def lora_parameters(model: Any) -> dict[str, Any]:
    return {n: each for n, each in model.named_parameters() if each.requires_grad}


def lora(model: Any) -> dict[str, torch.Tensor]:
    return {n: each.detach() for n, each in lora_parameters(model).items()}


def trained_a_little(base: BaseModel) -> Any:
    """B is not zero, so that A has gradients too."""
    model = fresh(base, config())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for each in lora_parameters(model).values():
            each.add_(0.02 * torch.randn(each.shape, generator=generator))
    return model


def instructed(tokenizer: Any, instruction: str) -> list[Rendered]:
    system = [{"role": "system", "content": instruction}] if instruction else []
    return [
        render(
            tokenizer,
            [*system, *row.case.messages],
            row.case.stable.text,
            stops=frozenset({tokenizer.eos_token_id}),
            max_length=128,
        )
        for row in sentences(6)
    ]


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
    examples = instructed(tokenizer, instruction)
    model = trained_a_little(base)
    together = pack(examples, share=share)
    assert (together.mask is not None) == (share and bool(instruction))
    gradients = []
    log_probabilities = []
    for rows in ([together], [pack([each]) for each in examples]):
        model.zero_grad()
        found = torch.cat([sft.log_probabilities(model, row) for row in rows])
        found.sum().backward()
        log_probabilities.append(found.detach())
        gradients.append({n: each.grad.clone() for n, each in lora_parameters(model).items()})
    assert torch.allclose(log_probabilities[0], log_probabilities[1], atol=1e-4)
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], rtol=1e-3, atol=1e-4)


def test_a_shared_instruction_is_computed_once(tokenizer: Any) -> None:
    examples = instructed(tokenizer, "Say whether it is warm, cold or mild. " * 3)
    row = pack(examples)
    assert row.ids.shape[1] < row.tokens / 2 == pack(examples, share=False).ids.shape[1] / 2


def test_only_answers_have_targets(examples: list[Rendered]) -> None:
    row = pack(examples[:2], share=False)
    assert tuple(row.targets.tolist()) == examples[0].answer + examples[1].answer
    assert row.ids[0, row.kept + 1].tolist() == row.targets.tolist()


def test_a_fresh_adapter_is_the_base_exactly(base: BaseModel, examples: list[Rendered]) -> None:
    model = fresh(base, config()).eval()
    row = pack(examples[:2])
    with torch.no_grad():
        adapted = sft.log_probabilities(model, row)
        with model.disable_adapter():
            assert torch.equal(adapted, sft.log_probabilities(model, row))


def test_the_loss_is_the_mean_over_all_learnt_tokens_of_a_step(
    base: BaseModel, examples: list[Rendered]
) -> None:
    steps: list[Progress] = []
    settings = config(epochs=1, batch_tokens=10_000, warmup=0.0)
    model = fresh(base, settings)
    with torch.no_grad():
        expected = torch.cat([-sft.log_probabilities(model, pack([each])) for each in examples])
    loop.train(model, examples, [], settings, on_step=steps.append, should_stop=lambda: False)
    assert len(steps) == 1
    assert steps[0].loss == pytest.approx(expected.mean().item(), rel=1e-4)


def test_training_lowers_the_loss_and_reports_its_progress(
    base: BaseModel, examples: list[Rendered]
) -> None:
    steps: list[Progress] = []
    settings = config(epochs=4, batch_tokens=128, learning_rate=0.01)
    done = loop.train(
        fresh(base, settings),
        examples[4:],
        examples[:4],
        settings,
        on_step=steps.append,
        should_stop=lambda: False,
    )
    assert steps[-1].done == steps[-1].total == done.steps == len(steps)
    assert steps[-1].eta == 0.0
    assert done.tokens == 4 * sum(len(each.ids) for each in examples[4:])
    measured = [each.validation_loss for each in steps if each.validation_loss is not None]
    assert len(measured) == 4
    assert measured[-1] < measured[0]
    assert steps[-1].loss < 0.5 * steps[0].loss


def test_a_run_stopped_anywhere_ends_with_the_same_weights(
    base: BaseModel, examples: list[Rendered], tmp_path: Path
) -> None:
    settings = config(epochs=2, batch_tokens=128)
    whole = fresh(base, settings)
    seen = 0

    def count(_: Progress) -> None:
        nonlocal seen
        seen += 1

    loop.train(whole, examples, [], settings, on_step=count, should_stop=lambda: False)
    seen = 0

    checkpointing = Checkpointing(tmp_path, job="one", seconds=1e9)
    for stop_at in (2, 5):
        with pytest.raises(StoppedError):
            loop.train(
                fresh(base, settings),
                examples,
                [],
                settings,
                on_step=count,
                should_stop=lambda: seen >= stop_at,  # noqa: B023 - called within this turn
                checkpointing=checkpointing,
            )
        assert seen == stop_at
    resumed = fresh(base, settings)
    loop.train(
        resumed,
        examples,
        [],
        settings,
        on_step=count,
        should_stop=lambda: False,
        checkpointing=checkpointing,
    )
    expected = lora(whole)
    assert all(torch.equal(each, expected[name]) for name, each in lora(resumed).items())


def test_another_jobs_checkpoint_is_not_taken(
    base: BaseModel, examples: list[Rendered], tmp_path: Path
) -> None:
    settings = config(epochs=1, batch_tokens=128)
    steps: list[Progress] = []
    for job in ("one", "other"):
        steps.clear()
        loop.train(
            fresh(base, settings),
            examples,
            [],
            settings,
            on_step=steps.append,
            should_stop=lambda: False,
            checkpointing=Checkpointing(tmp_path, job=job, seconds=0.0),
        )
        assert steps[0].done == 1


def test_a_loss_that_is_no_number_ends_the_run(base: BaseModel, examples: list[Rendered]) -> None:
    settings = config(learning_rate=1.0, max_grad_norm=1e6, epochs=200, batch_tokens=128)
    model = fresh(base, settings)
    with torch.no_grad():
        next(iter(lora(model).values())).fill_(math.inf)
    with pytest.raises(DivergedError) as diverged:
        loop.train(model, examples, [], settings, on_step=lambda _: None, should_stop=lambda: False)
    assert diverged.value.param == "learning_rate"


def test_the_learning_rate_rises_and_falls() -> None:
    rates = [schedule(step, 100, config(warmup=0.1)) for step in range(100)]
    assert rates[:10] == sorted(rates[:10])
    assert rates[10] == max(rates) == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < 0.01
    assert schedule(50, 100, config(schedule="constant", warmup=0.0)) == 1.0


def test_what_is_saved_names_the_base_and_nothing_of_this_machine(
    base: BaseModel, examples: list[Rendered], tmp_path: Path
) -> None:
    settings = config(epochs=1, batch_tokens=128)
    model = fresh(base, settings)
    loop.train(model, examples, [], settings, on_step=lambda _: None, should_stop=lambda: False)
    save_adapter(model, tmp_path, "tiny")
    assert {each.name for each in tmp_path.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert str(base.path) not in (tmp_path / "adapter_config.json").read_text()
    info = check_adapter(tmp_path, max_rank=16, base_name="tiny", base_shapes=base.shapes())
    assert info.rank == 16
    # Four layers of q, k, v, o, gate, up and down; the head stays as it is.
    assert len(info.modules) == 4 * 7
