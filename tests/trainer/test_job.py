"""A job by each method and backend, on a tiny model: what it leaves can be served, or it says why."""

import json
import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from rollout.adapters import check_adapter
from rollout.datasets import Dataset, Example, Unanswered, from_rows
from rollout.errors import InvalidInputError, UnservableError
from tests.trainer import train_with_peft
from tests.trainer.samples import sentences
from trainer.bundle import PINS_FILE, PROBES_FILE
from trainer.config import TrainingConfig
from trainer.external import ExternalError, StoppedExternallyError, admit, check_command
from trainer.job import Job, carry_out

TRAIN_WITH_PEFT = Path(train_with_peft.__file__)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def dataset() -> Dataset:
    """Sentences with a right and a wrong answer, and two that nobody could answer."""
    rows = [
        Example(
            case=f"c{number:03d}",
            messages=tuple(row.case.messages),
            gold=row.case.stable.text,
            labeler="ada",
            choice="first",
            inclusion=1.0,
            cluster=str(number),
            split="train" if number < 24 else "validation" if number < 34 else "heldout",
            rejected=("something else",),
        )
        for number, row in enumerate(sentences(38))
    ]
    ask = ({"role": "user", "content": "grey or brown?"},)
    unanswered = [
        Unanswered(f"u{number}", ask, ("purple",), 1.0, f"u{number}", "train")
        for number in range(2)
    ]
    return from_rows(rows, unanswered)


class Bench:
    """Carries jobs out in a folder and keeps what they report."""

    def __init__(self, model: Path, folder: Path) -> None:
        self._model, self._folder = model, folder
        self.lines: list[Mapping[str, Any]] = []

    def job(self, command: str = "", *, seconds: float = 120.0, **settings: Any) -> Job:
        config = {"epochs": 1, "row_tokens": 256, "max_length": 128, **settings}
        job = Job(
            base="tiny",
            base_path=str(self._model),
            folder=str(self._folder),
            config=asdict(TrainingConfig.from_mapping(config)),
            max_rank=16,
            external={"template": command, "seconds": seconds},
            threads=1,
        )
        job.dataset.parent.mkdir(parents=True, exist_ok=True)
        job.dataset.write_bytes(dataset().content)
        return job

    def carry_out(self, job: Job, *, stop_after: int = 1 << 30) -> Path:
        carry_out(job, self.lines.append, lambda: len(self.lines) >= stop_after)
        return job.bundle

    @property
    def losses(self) -> list[float]:
        return [line["progress"]["loss"] for line in self.lines if "progress" in line]


@pytest.fixture
def bench(tiny_model_dir: Path, tmp_path: Path) -> Bench:
    return Bench(tiny_model_dir, tmp_path / "run")


def effect(bundle: Path) -> float:
    """The largest difference that the adapter makes to the probes."""
    probes: list[dict[str, list[float]]] = json.loads((bundle / PROBES_FILE).read_text())
    assert probes
    return max(
        abs(one - other)
        for probe in probes
        for one, other in zip(probe["adapter"], probe["base"], strict=True)
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "dpo"},
        {"method": "ipo"},
        {"method": "kto"},
        {"method": "orpo", "rslora": True},
        {"method": "distill", "teacher": "large", "gradient_checkpointing": True},
    ],
    ids=lambda settings: settings["method"],
)
def test_every_method_makes_an_adapter_that_can_be_served(
    bench: Bench, settings: Mapping[str, Any]
) -> None:
    bundle = bench.carry_out(bench.job(learning_rate=3e-3, epochs=3, **settings))
    info = check_adapter(bundle, max_rank=16, base_name="tiny")
    assert info.rank == 16
    assert effect(bundle) > 0.01
    assert bench.losses[-1] < bench.losses[0]
    pins = json.loads((bundle / PINS_FILE).read_text())
    assert pins["config"]["method"] == settings["method"]
    assert pins["validation_loss"] > 0


def test_the_base_is_asked_once(bench: Bench) -> None:
    bench.carry_out(bench.job(method="dpo"))
    reference = Path(bench.job().folder) / "reference.json"
    before = reference.stat().st_mtime_ns
    bench.carry_out(bench.job(method="dpo", learning_rate=1e-5))
    assert reference.stat().st_mtime_ns == before
    # IPO compares the same answers; a pair that counts its tail by half is another.
    bench.carry_out(bench.job(method="dpo", ld_alpha=0.5))
    assert reference.stat().st_mtime_ns > before


def test_full_weights_leave_a_model_of_their_own(bench: Bench) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    bundle = bench.carry_out(bench.job(weights="full", learning_rate=1e-3))
    assert bench.losses[-1] < bench.losses[0]
    assert not (bundle / PROBES_FILE).exists()
    AutoTokenizer.from_pretrained(bundle)
    AutoModelForCausalLM.from_pretrained(bundle)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine may have what is missing")
def test_a_machine_that_cannot_hold_four_bits_says_what_it_lacks(bench: Bench) -> None:
    with pytest.raises(UnservableError, match="an NVIDIA GPU") as refused:
        bench.carry_out(bench.job(weights="qlora"))
    assert refused.value.param == "weights"


@pytest.mark.parametrize(
    ("modules", "kind"),
    [
        (["q_proj", "typo_proj"], InvalidInputError),
        (["q_proj", "embed_tokens"], UnservableError),
    ],
)
def test_modules_that_the_base_lacks_are_named(
    bench: Bench, modules: list[str], kind: type[InvalidInputError]
) -> None:
    with pytest.raises(kind) as refused:
        bench.carry_out(bench.job(target_modules=modules))
    assert refused.value.param == "target_modules"


def test_wrong_answers_alone_teach_nothing_to_compare(bench: Bench) -> None:
    job = bench.job(method="kto", minimum_rows=1)
    only_wrong = list(dataset().unanswered)
    job.dataset.write_bytes(from_rows([], only_wrong).content)
    with pytest.raises(InvalidInputError, match="one kind"):
        bench.carry_out(job)


EXTERNAL = (
    f"{sys.executable} {TRAIN_WITH_PEFT} --dataset {{dataset}} --base {{base}} "
    "--output {output} --config {config}"
)


def test_a_foreign_trainers_adapter_is_admitted_and_probed(bench: Bench) -> None:
    bundle = bench.carry_out(bench.job(EXTERNAL, backend="external"))
    check_adapter(bundle, max_rank=16, base_name="tiny")
    assert effect(bundle) > 0.01
    said = [line["message"] for line in bench.lines]
    assert any("trained on 24 rows" in line for line in said)
    assert {each.name for each in bundle.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        PINS_FILE,
        PROBES_FILE,
    }


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--rank=32", "ranks up to 16"),
        ("--untrained", "all lora_B weights are zero"),
        ("--dora", "DoRA"),
        ("--nothing", "left no adapter_config.json"),
        ("--other-base", "trained on another base"),
    ],
)
def test_a_foreign_adapter_that_cannot_be_served_is_refused(
    tiny_model_dir: Path, tmp_path: Path, flag: str, words: str
) -> None:
    rows, config = tmp_path / "rows.jsonl", tmp_path / "config.json"
    rows.write_text(
        json.dumps(
            {
                "prompt": [{"role": "user", "content": "red"}],
                "completion": [{"role": "assistant", "content": "warm"}],
            }
        )
    )
    config.write_text('{"epochs": 1}')
    left, draft = tmp_path / "left", tmp_path / "draft"
    left.mkdir()
    draft.mkdir()
    files = (f"--dataset={rows}", f"--base={tiny_model_dir}", f"--output={left}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train_with_peft.main([*files, f"--config={config}", flag])

    def look_at_it() -> None:
        admit(left, draft, "tiny", tiny_model_dir)
        check_adapter(draft, max_rank=16, base_name="tiny")

    with pytest.raises(UnservableError, match=words):
        look_at_it()


@pytest.mark.parametrize(
    ("config", "words"), [("{", "is no valid JSON"), ("[]", "is no JSON object")]
)
def test_a_foreign_adapter_without_a_readable_config_is_refused(
    tmp_path: Path, config: str, words: str
) -> None:
    (tmp_path / "adapter_config.json").write_text(config)
    (tmp_path / "adapter_model.safetensors").touch()
    with pytest.raises(UnservableError, match=words):
        admit(tmp_path, tmp_path / "draft", "tiny", tmp_path / "base")


def test_a_foreign_trainer_that_fails_is_quoted(bench: Bench) -> None:
    command = f"{sys.executable} -c \"import os; print('no', 'memory'); os._exit(7)\" {{dataset}} {{output}}"
    with pytest.raises(ExternalError, match=r"status 7: .*no memory"):
        bench.carry_out(bench.job(command, backend="external"))


def test_a_foreign_trainer_is_ended_when_its_time_is_up(bench: Bench) -> None:
    command = f'{sys.executable} -c "import time; time.sleep(600)" {{dataset}} {{output}}'
    with pytest.raises(ExternalError, match="longer than 1 s"):
        bench.carry_out(bench.job(command, backend="external", seconds=1.0))


def test_a_foreign_trainer_is_ended_when_the_run_is_to_stop(bench: Bench) -> None:
    code = "import time; print('begun', flush=True); time.sleep(600)"
    command = f'{sys.executable} -c "{code}" {{dataset}} {{output}}'
    with pytest.raises(StoppedExternallyError):
        bench.carry_out(bench.job(command, backend="external"), stop_after=2)
    assert bench.lines[-1]["message"] == "external: begun"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("", "needs a command"),
        ("train {dataset}", "must name"),
        ("train {dataset} {output} {secret}", "there is no {secret}"),
        ("train '{dataset} {output}", "cannot be read"),
    ],
)
def test_a_command_that_cannot_work_is_refused(template: str, words: str) -> None:
    with pytest.raises(InvalidInputError, match=words):
        check_command(template)
