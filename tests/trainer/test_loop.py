"""The loop on a tiny model: packing that doesn't mix, a loss that falls, a run that resumes."""

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from rollout.adapters import check_adapter
from tests.trainer.tiny import config, fresh, lora, rendered
from trainer import loop
from trainer.adapter import save_adapter
from trainer.base import BaseModel
from trainer.loop import Checkpointing, DivergedError, Progress, StoppedError, schedule
from trainer.methods.likelihood import log_probabilities
from trainer.packing import Item, pack


@pytest.fixture
def base(tiny_model_dir: Path) -> BaseModel:
    return BaseModel.open("tiny", tiny_model_dir)


@pytest.fixture(scope="session")
def examples(tokenizer: Any) -> list[Item]:
    return [Item((each,)) for each in rendered(tokenizer, 24)]


def test_a_fresh_adapter_is_the_base_exactly(base: BaseModel, examples: list[Item]) -> None:
    model = fresh(base, config()).eval()
    row = pack(examples[:2])
    with torch.no_grad():
        adapted = log_probabilities(model, row)
        with model.disable_adapter():
            assert torch.equal(adapted, log_probabilities(model, row))


def test_the_loss_is_the_mean_over_all_learnt_tokens_of_a_step(
    base: BaseModel, examples: list[Item]
) -> None:
    steps: list[Progress] = []
    settings = config(epochs=1, batch_tokens=10_000, warmup=0.0)
    model = fresh(base, settings)
    with torch.no_grad():
        expected = torch.cat([-log_probabilities(model, pack([each])) for each in examples])
    loop.train(model, examples, [], settings, on_step=steps.append, should_stop=lambda: False)
    assert len(steps) == 1
    assert steps[0].loss == pytest.approx(expected.mean().item(), rel=1e-4)


def test_training_lowers_the_loss_and_reports_its_progress(
    base: BaseModel, examples: list[Item]
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
    assert done.tokens == 4 * sum(len(each) for each in examples[4:])
    measured = [each.validation_loss for each in steps if each.validation_loss is not None]
    assert len(measured) == 4
    assert measured[-1] < measured[0]
    assert steps[-1].loss < 0.5 * steps[0].loss


def test_a_run_stopped_anywhere_ends_with_the_same_weights(
    base: BaseModel, examples: list[Item], tmp_path: Path
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
    base: BaseModel, examples: list[Item], tmp_path: Path
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


def test_a_loss_that_is_no_number_ends_the_run(base: BaseModel, examples: list[Item]) -> None:
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
    base: BaseModel, examples: list[Item], tmp_path: Path
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


def overfitting(examples: list[Item]) -> dict[str, Any]:
    """Rows whose validation loss rises once they are known by heart: the answers are others'."""
    wrong = [
        Item((replace(each.examples[0], ids=each.examples[0].prompt + other.examples[0].answer),))
        for each, other in pairwise(examples[:9])
    ]
    settings = config(epochs=6, batch_tokens=512, learning_rate=0.02, warmup=0.0)
    # Repeated until there are enough to choose by.
    return {"items": examples, "validation": wrong * 4, "config": settings}


def test_the_weights_of_the_lowest_validation_loss_are_kept(
    base: BaseModel, examples: list[Item]
) -> None:
    run = overfitting(examples)
    steps: list[Progress] = []
    seen: dict[int, dict[str, torch.Tensor]] = {}
    model = fresh(base, run["config"])

    def note(progress: Progress) -> None:
        steps.append(progress)
        seen[progress.done] = {name: each.clone() for name, each in lora(model).items()}

    done = loop.train(model, **run, on_step=note, should_stop=lambda: False)
    measured = {each.done: each.validation_loss for each in steps if each.validation_loss}
    best = min(measured, key=lambda step: measured[step] or math.inf)
    assert done.kept == best < done.steps
    assert done.validation_loss == measured[best]
    assert all(torch.equal(each, seen[best][name]) for name, each in lora(model).items())


def test_the_last_weights_are_kept_where_there_is_too_little_to_choose_by(
    base: BaseModel, examples: list[Item]
) -> None:
    run = overfitting(examples)
    few = {**run, "validation": run["validation"][:8]}
    model = fresh(base, run["config"])
    done = loop.train(model, **few, on_step=lambda _: None, should_stop=lambda: False)
    assert done.kept == done.steps


def test_a_run_ends_early_where_nothing_gets_better(base: BaseModel, examples: list[Item]) -> None:
    run = overfitting(examples)
    settings = replace(run["config"], patience=1, epochs=12)
    done = loop.train(
        fresh(base, settings),
        **{**run, "config": settings},
        on_step=lambda _: None,
        should_stop=lambda: False,
    )
    assert done.kept < done.steps < len(loop.plan_run(run["items"], settings)[0])


def test_a_resumed_run_remembers_the_best_weights(
    base: BaseModel, examples: list[Item], tmp_path: Path
) -> None:
    run = overfitting(examples)
    whole = fresh(base, run["config"])
    steps: list[Progress] = []
    expected = loop.train(whole, **run, on_step=steps.append, should_stop=lambda: False)

    again: list[Progress] = []
    checkpointing = Checkpointing(tmp_path, job="one", seconds=1e9)
    with pytest.raises(StoppedError):
        loop.train(
            fresh(base, run["config"]),
            **run,
            on_step=again.append,
            should_stop=lambda: len(again) > expected.kept,
            checkpointing=checkpointing,
        )
    resumed = fresh(base, run["config"])
    done = loop.train(
        resumed,
        **run,
        on_step=again.append,
        should_stop=lambda: False,
        checkpointing=checkpointing,
    )
    assert done == replace(expected, loss=done.loss)
    assert all(torch.equal(each, lora(whole)[name]) for name, each in lora(resumed).items())


def test_computing_activations_twice_changes_no_gradient(
    base: BaseModel, examples: list[Item]
) -> None:
    trained = []
    for twice in (False, True):
        settings = config(epochs=1, gradient_checkpointing=twice)
        model = fresh(base, settings)
        loop.train(model, examples, [], settings, on_step=lambda _: None, should_stop=lambda: False)
        trained.append(lora(model))
    assert all(torch.allclose(each, trained[1][name]) for name, each in trained[0].items())
