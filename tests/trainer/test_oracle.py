"""Loss and gradients are TRL's: the oracle of every method, on a tiny model in float32."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.tiny import config, lora_parameters, rendered, trained_a_little
from trainer import loop
from trainer.base import BaseModel
from trainer.config import TrainingConfig
from trainer.items import pair, with_mismatched
from trainer.methods.reference import with_reference
from trainer.methods.step import Part, totals_of
from trainer.packing import Item
from trainer.rendering import Rendered

pytest.importorskip("trl", reason="TRL is installed for development only")
pytestmark = pytest.mark.filterwarnings("ignore")

TOLERANCE = 1e-5
INSTRUCTION = "Say whether it is warm, cold or mild. " * 2

Gradients = Mapping[str, torch.Tensor]


@pytest.fixture(scope="module")
def base(tiny_model_dir: Path) -> BaseModel:
    return BaseModel.open("tiny", tiny_model_dir)


@pytest.fixture(scope="module")
def examples(tokenizer: Any) -> list[Rendered]:
    """Six prompts, some of which begin alike, with answers of different lengths."""
    short = rendered(tokenizer, 6, instruction=INSTRUCTION)
    return [
        Rendered(
            each.ids[:-1] + tuple(range(100, 100 + 3 * place)) + each.ids[-1:], each.answer_start
        )
        for place, each in enumerate(short)
    ]


def pairs(examples: Sequence[Rendered], settings: TrainingConfig) -> list[Item]:
    """Each example beside the same prompt with another's answer."""
    others = [
        Rendered(each.prompt + examples[place - 1].answer, each.answer_start)
        for place, each in enumerate(examples)
    ]
    return [pair(*each, settings) for each in zip(examples, others, strict=True)]


def ours(
    base: BaseModel, items: Sequence[Item], settings: TrainingConfig, *, row_of: int
) -> tuple[float, Gradients]:
    """The loss of one step that has so many items in each of its rows."""
    model = trained_a_little(base, settings)
    method = loop.METHODS[settings.method]
    packer = loop.packer_for(model, items, torch.device("cpu"))
    if method.needs_reference:
        items = with_reference(model, items, packer, row_tokens=settings.row_tokens)
    parts = [items[place : place + row_of] for place in range(0, len(items), row_of)]
    totals = loop.totals_with_drift(totals_of(parts), model, method, parts, packer)
    loss = 0.0
    for part in parts:
        of_part = method.loss(model, packer(method.learnt(part)), Part(part, totals, settings))
        of_part.backward()
        loss += of_part.item()
    return loss, gradients(model)


def theirs(trainer: Any, inputs: Any) -> tuple[float, Gradients]:
    trainer.model.train()
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    return loss.item(), gradients(trainer.model)


def gradients(model: Any) -> Gradients:
    return {name: each.grad.clone() for name, each in lora_parameters(model).items()}


def assert_same(mine: tuple[float, Gradients], yours: tuple[float, Gradients]) -> None:
    assert mine[0] == pytest.approx(yours[0], rel=TOLERANCE)
    assert mine[1].keys() == yours[1].keys()
    for name, gradient in mine[1].items():
        expected = yours[1][name]
        assert expected.norm() > 0, name
        assert (gradient - expected).norm() / expected.norm() < TOLERANCE, name


@pytest.fixture(scope="module")
def trl_options(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    return {
        "output_dir": str(tmp_path_factory.mktemp("trl")),
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": 6,
        "max_length": 256,
    }


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    """TRL warns of much. On matrices this small threads wait for each other most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.set_num_threads(threads)


def texts(kind: str) -> Any:
    """Rows that a trainer of TRL's wants to be given; none of them is used."""
    from datasets import Dataset

    row = {"prompt": "red", "chosen": "warm", "rejected": "cold"}
    rows = {
        "sft": {"prompt": "red", "completion": "warm"},
        "pairs": row,
        "kto": {"prompt": "red", "completion": "warm", "label": True},
    }
    return Dataset.from_list([rows[kind]] * 6)


Oracle = Callable[[Sequence[Rendered], TrainingConfig], tuple[float, Gradients]]
# A trainer of TRL's, its arguments, and the kind of rows that it wants.
Build = Callable[[Any, Any, str], Any]


@pytest.fixture(scope="module")
def build(base: BaseModel, tokenizer: Any) -> Build:
    def built(kind: Any, arguments: Any, rows: str) -> Any:
        trainer = kind(
            trained_a_little(base),
            args=arguments,
            train_dataset=texts(rows),
            processing_class=tokenizer,
        )
        # Some take an adapter that they are given as the reference, where ours is the base.
        if "ref" in trainer.model.peft_config:
            trainer.model.delete_adapter("ref")
        return trainer

    return built


@pytest.fixture(scope="module")
def sft(build: Build, trl_options: Mapping[str, Any]) -> Oracle:
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    trainer = build(SFTTrainer, SFTConfig(**trl_options), "sft")

    def step(examples: Sequence[Rendered], settings: TrainingConfig) -> tuple[float, Gradients]:
        rows = [
            {"input_ids": list(each.ids), "labels": [-100] * each.answer_start + list(each.answer)}
            for each in examples
        ]
        return theirs(trainer, trainer.data_collator(rows))

    return step


@pytest.fixture(scope="module")
def dpo(build: Build, trl_options: Mapping[str, Any]) -> Oracle:
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    trainer = build(DPOTrainer, DPOConfig(**trl_options), "pairs")

    def step(examples: Sequence[Rendered], settings: TrainingConfig) -> tuple[float, Gradients]:
        trainer.loss_types = ["ipo" if settings.method == "ipo" else settings.dpo_loss]
        trainer.beta = settings.beta
        trainer.label_smoothing = settings.label_smoothing
        trainer.ld_alpha = None if settings.ld_alpha == 1.0 else settings.ld_alpha
        rows = [
            {
                "prompt_ids": list(each.prompt),
                "chosen_ids": list(each.answer),
                "rejected_ids": list(examples[place - 1].answer),
            }
            for place, each in enumerate(examples)
        ]
        return theirs(trainer, trainer.data_collator(rows))

    return step


@pytest.fixture(scope="module")
def kto(build: Build, trl_options: Mapping[str, Any]) -> Oracle:
    from trl.trainer.kto_config import KTOConfig
    from trl.trainer.kto_trainer import KTOTrainer

    arguments = KTOConfig(**trl_options, train_sampling_strategy="sequential")
    trainer = build(KTOTrainer, arguments, "kto")

    def step(examples: Sequence[Rendered], settings: TrainingConfig) -> tuple[float, Gradients]:
        trainer.loss_type = settings.kto_loss
        trainer.calculate_KL = settings.kto_loss == "kto"
        trainer.desirable_weight = settings.desirable_weight
        trainer.undesirable_weight = settings.undesirable_weight
        rows = [
            {
                "prompt_ids": list(each.prompt),
                "completion_ids": list(each.answer),
                "KL_completion_ids": list(examples[place - 1].answer),
                "label": place % 3 > 0,
            }
            for place, each in enumerate(examples)
        ]
        return theirs(trainer, trainer.data_collator(rows))

    return step


@pytest.fixture(scope="module")
def orpo(build: Build, trl_options: Mapping[str, Any]) -> Oracle:
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer
    from trl.trainer.utils import pad

    trainer = build(ORPOTrainer, ORPOConfig(**trl_options), "pairs")

    def side(examples: Sequence[Rendered], name: str) -> dict[str, torch.Tensor]:
        ids = [torch.tensor(each.ids) for each in examples]
        labels = [torch.tensor([-100] * each.answer_start + list(each.answer)) for each in examples]
        masks = [torch.ones_like(each) for each in ids]
        return {
            f"{name}_input_ids": pad(ids, padding_value=0),
            f"{name}_labels": pad(labels, padding_value=-100),
            f"{name}_attention_mask": pad(masks, padding_value=0),
        }

    def step(examples: Sequence[Rendered], settings: TrainingConfig) -> tuple[float, Gradients]:
        trainer.beta = settings.beta
        rejected = [
            Rendered(each.prompt + examples[place - 1].answer, each.answer_start)
            for place, each in enumerate(examples)
        ]
        return theirs(trainer, {**side(examples, "chosen"), **side(rejected, "rejected")})

    return step


@pytest.mark.parametrize("row_of", [1, 4, 6])
def test_supervised_fine_tuning(
    base: BaseModel, examples: list[Rendered], sft: Oracle, row_of: int
) -> None:
    items = [Item((each,)) for each in examples]
    assert_same(ours(base, items, config(), row_of=row_of), sft(examples, config()))


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "dpo"},
        {"method": "dpo", "dpo_loss": "sigmoid_norm", "beta": 0.5},
        {"method": "dpo", "dpo_loss": "hinge"},
        {"method": "dpo", "dpo_loss": "robust", "label_smoothing": 0.1},
        {"method": "dpo", "dpo_loss": "apo_zero"},
        {"method": "dpo", "dpo_loss": "apo_down"},
        {"method": "dpo", "ld_alpha": 0.5},
        {"method": "dpo", "ld_alpha": 0.0},
        {"method": "ipo"},
    ],
    ids=lambda settings: "-".join(str(value) for value in settings.values()),
)
def test_preferences(
    base: BaseModel, examples: list[Rendered], dpo: Oracle, settings: Mapping[str, Any]
) -> None:
    chosen = config(**settings)
    expected = dpo(examples, chosen)
    for row_of in (1, 4):
        assert_same(ours(base, pairs(examples, chosen), chosen, row_of=row_of), expected)


@pytest.mark.parametrize(
    "settings",
    [
        {"kto_loss": "kto"},
        {"kto_loss": "kto", "desirable_weight": 0.5, "undesirable_weight": 1.5},
        {"kto_loss": "apo_zero_unpaired"},
    ],
    ids=["kto", "weighted", "apo"],
)
def test_single_answers(
    base: BaseModel, examples: list[Rendered], kto: Oracle, settings: Mapping[str, Any]
) -> None:
    chosen = config(method="kto", **settings)
    items = with_mismatched(
        [Item((each,), desirable=place % 3 > 0) for place, each in enumerate(examples)]
    )
    expected = kto(examples, chosen)
    for row_of in (1, 4):
        assert_same(ours(base, items, chosen, row_of=row_of), expected)


def test_odds_ratios(base: BaseModel, examples: list[Rendered], orpo: Oracle) -> None:
    chosen = config(method="orpo", orpo_learns="all")
    expected = orpo(examples, chosen)
    for row_of in (1, 4):
        assert_same(ours(base, pairs(examples, chosen), chosen, row_of=row_of), expected)
