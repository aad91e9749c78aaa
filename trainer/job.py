"""One training job in a process of its own: a job file in, lines of progress out, a bundle left.

    python -m trainer.job JOB.json

It ends when its standard input ends, with the state saved: so it outlives neither a trainer that
asks it to stop nor one that was killed. Its memory goes with it, and running out of it takes
nobody else along.
"""

import json
import os
import shutil
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from rollout.errors import SluiceError
from rollout.versions import Prompt
from trainer.base import BaseModel
from trainer.bundle import PINS_FILE, PROBES_FILE, pins_of, probes_of, rounding_of
from trainer.config import TrainingConfig
from trainer.dataset import Dataset
from trainer.dataset import load as load_dataset
from trainer.folders import CHECKPOINTS, hold
from trainer.rendering import stop_ids, with_prompt

if TYPE_CHECKING:
    from trainer.packing import Item

STOPPED_STATUS = 3
FAILED_STATUS = 1

# Never on the disk, as the job file is.
ENGINE_KEY = "SLUICE_ENGINE_KEY"
# What torch says of a GPU's memory, and of the machine's.
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory")
_COMPARED_PROMPTS = 4


@dataclass(frozen=True, slots=True)
class Job:
    """`folder` holds what the job reads and writes: `dataset.jsonl`, checkpoints, `bundle/`.

    `base_revision` is the one that the engine states, for the pins. `config` is a checked one as a
    mapping. `prompt` is what the new version carries. `max_rank` is the largest that the engine
    takes, `engine_url` the replica to compare prompts with (its key is in the environment),
    `external` an `external.Command` as a mapping.
    """

    base: str
    base_path: str
    folder: str
    config: Mapping[str, Any]
    prompt: Mapping[str, Any] | None = None
    max_rank: int | None = None
    base_revision: str | None = None
    engine_url: str | None = None
    external: Mapping[str, Any] | None = None
    gpus: int = 1
    threads: int = 0
    nice: int = 0
    checkpoint_seconds: float = 60.0

    @property
    def bundle(self) -> Path:
        return Path(self.folder) / "bundle"

    @property
    def dataset(self) -> Path:
        return Path(self.folder) / "dataset.jsonl"


Report = Callable[[Mapping[str, Any]], None]


def carry_out(job: Job, report: Report, should_stop: Callable[[], bool]) -> None:
    """Train, check what came out, and leave it in `job.bundle`, whole or not at all."""
    import torch

    torch.set_num_threads(job.threads or os.cpu_count() or 1)
    run = _prepare(job, report)
    draft = job.bundle.with_name(".bundle")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    if run.config.backend == "external":
        model, facts = _train_elsewhere(job, run, draft, report, should_stop)
    else:
        model, facts = _train_here(job, run, draft, report, should_stop)
    if model is not None:
        probes = probes_of(model, run.dataset, run.renderer)
        _write_json(draft / PROBES_FILE, [asdict(probe) for probe in probes])
        facts = {**facts, "rounding": rounding_of(model, probes, run.dtype)}
    _write_json(draft / PINS_FILE, {**run.pins, "dtype": _short(run.dtype), **facts})
    shutil.rmtree(job.bundle, ignore_errors=True)
    draft.rename(job.bundle)


@dataclass(frozen=True, slots=True)
class _Run:
    """What a job works with. `renderer` is an `items.Renderer`, the device and type are torch's."""

    config: TrainingConfig
    base: BaseModel
    dataset: Dataset
    prompt: Prompt | None
    pins: Mapping[str, Any]
    device: Any
    dtype: Any
    tokenizer: Any
    renderer: Any


def _prepare(job: Job, report: Report) -> _Run:
    """All that can be refused before a model is in memory."""
    from transformers import GenerationConfig

    from trainer import models
    from trainer.items import Renderer

    config = TrainingConfig.from_mapping(job.config, max_rank=job.max_rank)
    base = BaseModel.open(job.base, Path(job.base_path))
    dataset = load_dataset(job.dataset.read_bytes())
    prompt = None if job.prompt is None else Prompt(**job.prompt)
    models.check_machine(config)
    models.check_modules(base, config)
    report({"message": f"loading {job.base}"})
    device, dtype = models.choose_device(config)
    tokenizer = models.load_tokenizer(base)
    stated = (base.path / "generation_config.json").is_file()
    generation = GenerationConfig.from_pretrained(base.path) if stated else None
    renderer = Renderer(tokenizer, stop_ids(tokenizer, generation), prompt, config.max_length)
    pins = pins_of(base, job.base_revision, dataset, config, prompt)
    run = _Run(config, base, dataset, prompt, pins, device, dtype, tokenizer, renderer)
    _compare_prompts(job, run, report)
    return run


def _compare_prompts(job: Job, run: _Run, report: Report) -> None:
    from trainer.parity import Asked, check_serving
    from trainer.rendering import render_prompt

    if job.engine_url is None:
        return
    prompts = [
        Asked(
            row.case, messages, render_prompt(run.tokenizer, messages, row.tools or None), row.tools
        )
        for row in run.dataset.rows[:_COMPARED_PROMPTS]
        for messages in [with_prompt(row.messages, run.prompt)]
    ]
    key = os.environ.get(ENGINE_KEY)
    if why := check_serving(job.engine_url, key, job.base, prompts):
        report({"message": f"prompts are not compared with the engine's before the proof: {why}"})


def _train_here(
    job: Job, run: _Run, draft: Path, report: Report, should_stop: Callable[[], bool]
) -> tuple[Any, Mapping[str, Any]]:
    """The model to take probes of (none of a model of its own), and what is worth a pin."""
    from trainer import loop, models
    from trainer.items import check_items, items_of
    from trainer.ranks import join

    config, ranks = run.config, join()
    examples, dropped = items_of(run.dataset, "train", run.renderer, config)
    validation, _ = items_of(run.dataset, "validation", run.renderer, config)
    check_items(examples, dropped, config)
    device = getattr(ranks, "device", run.device)
    model = models.load_for(run.base, config, device, run.dtype)
    examples, validation = _with_reference(job, run, model, examples, validation, report)
    report({"message": f"training on {len(examples)} rows ({device.type}, {_short(run.dtype)})"})
    done = loop.train(
        model,
        examples,
        validation,
        config,
        on_step=lambda progress: report({"progress": asdict(progress)}),
        should_stop=should_stop,
        checkpointing=loop.Checkpointing(
            Path(job.folder) / CHECKPOINTS, run.pins["job"], job.checkpoint_seconds
        ),
        ranks=ranks,
    )
    if ranks.number:
        raise SystemExit(0)
    said = f"trained {done.steps} steps, {done.tokens:,} tokens, loss {done.loss:.3f}"
    report({"message": said, "dropped": dropped})
    facts = {
        "steps": done.steps,
        "tokens": done.tokens,
        "learning_rate": done.learning_rate,
        "batch_tokens": done.batch_tokens,
        "kept_step": done.kept,
        "validation_loss": done.validation_loss,
    }
    return _save(job, run, model, device, draft), facts


def _save(job: Job, run: _Run, model: Any, device: Any, draft: Path) -> Any:
    """The model to take probes of, as an engine will have it; none of a model of its own."""
    from rollout.adapters import check_adapter
    from trainer import models
    from trainer.adapter import save_adapter, save_full

    if run.config.weights == "full":
        save_full(model, run.tokenizer, draft, models.stored_dtype(run.base))
        return None
    save_adapter(model, draft, job.base)
    check_adapter(draft, max_rank=job.max_rank, base_name=job.base, base_shapes=run.base.shapes())
    if run.config.weights == "qlora":
        # The engine has the base as it is, not in four bits.
        del model
        model = models.with_adapter(models.load_base(run.base, device, run.dtype), draft)
    return model


def _with_reference(
    job: Job,
    run: _Run,
    model: Any,
    examples: list["Item"],
    validation: list["Item"],
    report: Report,
) -> tuple[list["Item"], list["Item"]]:
    from trainer import loop
    from trainer.methods.reference import with_reference

    if not loop.METHODS[run.config.method].needs_reference:
        return examples, validation
    report({"message": "asking the base what it makes of the answers"})
    every, count = [*examples, *validation], len(examples)
    device = next(model.parameters()).device
    seen = with_reference(
        model,
        every,
        loop.packer_for(model, every, device),
        row_tokens=run.config.row_tokens,
        cache=Path(job.folder) / "reference.json",
        pins=json.dumps(
            [run.pins["base_sha256"], _short(run.dtype), device.type, run.config.weights]
        ),
    )
    return seen[:count], seen[count:]


def _train_elsewhere(
    job: Job, run: _Run, draft: Path, report: Report, should_stop: Callable[[], bool]
) -> tuple[Any, Mapping[str, Any]]:
    """The same by a foreign trainer, whose adapter has to pass what ours does."""
    from rollout.adapters import check_adapter
    from trainer import models
    from trainer.external import Command, admit, train_externally

    command = Command(**(job.external or {"template": ""}))
    left = train_externally(
        command,
        Path(job.folder) / "external",
        run.base.path,
        run.dataset,
        run.prompt,
        run.config,
        on_line=lambda line: report({"message": f"external: {line}"}),
        should_stop=should_stop,
    )
    admit(left, draft, job.base, run.base.path)
    info = check_adapter(
        draft, max_rank=job.max_rank, base_name=job.base, base_shapes=run.base.shapes()
    )
    report({"message": f"the external trainer left an adapter of rank {info.rank}"})
    model = models.with_adapter(models.load_base(run.base, run.device, run.dtype), draft)
    return model, {"external": command.template, "rank": info.rank, "alpha": info.alpha}


def _short(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def main(argv: Sequence[str]) -> int:
    job = Job(**json.loads(Path(argv[0]).read_text(encoding="utf-8")))
    # Libraries that print would otherwise speak among the lines of progress.
    lines = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    os.nice(job.nice)
    stopping = threading.Event()
    threading.Thread(target=_watch_input, args=(stopping,), daemon=True).start()
    from trainer.external import StoppedExternallyError
    from trainer.loop import StoppedError

    # Of several processes the first speaks, and hears.
    first = int(os.environ.get("RANK", "0")) == 0
    alone: TextIO | None = None
    try:
        alone = hold(Path(job.folder)) if first else None
        carry_out(
            job,
            lambda line: _say(lines, line) if first else None,
            lambda: first and stopping.is_set(),
        )
    except (StoppedError, StoppedExternallyError):
        return STOPPED_STATUS
    except SluiceError as exc:
        _say(lines, {"error": exc.message, "param": exc.param, "code": exc.code})
        return FAILED_STATUS
    except (MemoryError, RuntimeError, OSError) as exc:
        _say(lines, {"error": _explain(exc)})
        return FAILED_STATUS
    finally:
        if alone is not None:
            alone.close()
    return 0


def _watch_input(stopping: threading.Event) -> None:
    sys.stdin.read()
    stopping.set()


def _say(lines: TextIO, line: Mapping[str, Any]) -> None:
    lines.write(json.dumps(line) + "\n")
    lines.flush()


def _explain(exc: Exception) -> str:
    text = str(exc).strip().splitlines()[0] if str(exc).strip() else type(exc).__name__
    if isinstance(exc, MemoryError) or any(words in text.lower() for words in _OUT_OF_MEMORY):
        return (
            f"out of memory ({text}): choose a smaller row_tokens or max_length, or a machine with "
            "more memory"
        )
    if isinstance(exc, OSError):
        return f"the disk: {text}; make room or mend its permissions, then start the run again"
    return text


if __name__ == "__main__":
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        os.environ.setdefault(variable, "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Threads that spin while they wait cost a training that shares its cores with an engine nine
    # tenths of its speed.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    sys.exit(main(sys.argv[1:]))
