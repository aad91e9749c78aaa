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
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

from rollout.errors import InvalidInputError, SluiceError
from rollout.versions import Prompt
from trainer.base import BaseModel
from trainer.config import TrainingConfig
from trainer.dataset import Dataset
from trainer.dataset import load as load_dataset
from trainer.rendering import Rendered, stop_ids, with_prompt

PROBES_FILE = "probes.json"
PINS_FILE = "pins.json"

STOPPED_STATUS = 3
FAILED_STATUS = 1

# Enough that no other adapter passes by chance, few enough that proving takes seconds.
_PROBES = 8
_PROBED_TOKENS = 64
_LIBRARIES = ("sluice", "torch", "transformers", "peft", "tokenizers", "safetensors")


@dataclass(frozen=True, slots=True)
class Job:
    """`folder` holds what the job reads and writes: `dataset.jsonl`, checkpoints, `bundle/`.

    `config` is a checked one as a mapping. `prompt` is what the new version carries.
    """

    base: str
    base_path: str
    folder: str
    config: Mapping[str, Any]
    prompt: Mapping[str, Any] | None = None
    threads: int = 0
    nice: int = 0
    checkpoint_seconds: float = 60.0

    @property
    def bundle(self) -> Path:
        return Path(self.folder) / "bundle"

    @property
    def dataset(self) -> Path:
        return Path(self.folder) / "dataset.jsonl"


@dataclass(frozen=True, slots=True)
class Probe:
    """A prompt with an answer, and what the trainer's model gives its last tokens.

    `ids` are prompt and answer; `adapter` and `base` the log-probabilities (nats) of the last
    tokens of `ids`, with the adapter and without.
    """

    messages: Sequence[Mapping[str, Any]]
    ids: Sequence[int]
    prompt_tokens: int
    adapter: Sequence[float]
    base: Sequence[float]


Report = Callable[[Mapping[str, Any]], None]


def carry_out(job: Job, report: Report, should_stop: Callable[[], bool]) -> None:
    """Train, check what came out, and leave it in `job.bundle`, whole or not at all."""
    import torch

    from rollout.adapters import check_adapter
    from trainer import loop, models
    from trainer.adapter import save_adapter
    from trainer.items import Renderer, check_kinds, items_of
    from trainer.methods.reference import with_reference

    torch.set_num_threads(job.threads or os.cpu_count() or 1)
    config = TrainingConfig.from_mapping(job.config)
    base = BaseModel.open(job.base, Path(job.base_path))
    dataset = load_dataset(job.dataset.read_bytes())
    prompt = None if job.prompt is None else Prompt(**job.prompt)

    report({"message": f"loading {job.base}"})
    pins = _pins(base, dataset, config, prompt)
    models.check_machine(config)
    models.check_modules(base, config)
    device, dtype = models.choose_device(config)
    tokenizer = models.load_tokenizer(base)
    model = models.load_for(base, config, device, dtype)
    renderer = Renderer(
        tokenizer, stop_ids(tokenizer, model.generation_config), prompt, config.max_length
    )
    examples, dropped = items_of(dataset, "train", renderer, config)
    validation, _ = items_of(dataset, "validation", renderer, config)
    if len(examples) < config.minimum_rows:
        raise InvalidInputError(
            f"{len(examples)} rows are left to train on, and {config.minimum_rows} are needed"
            + (
                f": {dropped} have more than max_length = {config.max_length} tokens"
                if dropped
                else ""
            )
            + (
                ""
                if config.method in ("sft", "distill")
                else f"; {config.method} learns from answers "
                "that a person refused: label more cases"
            ),
            param="max_length" if dropped else "minimum_rows",
        )
    check_kinds(examples, config)
    if loop.METHODS[config.method].needs_reference:
        report({"message": "asking the base for its view of the answers"})
        packer = loop.packer_for(model, [*examples, *validation], device)
        count = len(examples)
        seen = with_reference(
            model,
            [*examples, *validation],
            packer,
            row_tokens=config.row_tokens,
            cache=Path(job.folder) / "reference.json",
            pins=json.dumps([pins["base_sha256"], _short(dtype), device.type, config.weights]),
        )
        examples, validation = seen[:count], seen[count:]
    report({"message": f"training on {len(examples)} rows ({device.type}, {_short(dtype)})"})
    done = loop.train(
        model,
        examples,
        validation,
        config,
        on_step=lambda progress: report({"progress": asdict(progress)}),
        should_stop=should_stop,
        checkpointing=loop.Checkpointing(
            Path(job.folder) / "checkpoint", pins["job"], job.checkpoint_seconds
        ),
    )

    draft = job.bundle.with_name(".bundle")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    save_adapter(model, draft, job.base)
    check_adapter(draft, base_name=job.base, base_shapes=base.shapes())
    probes = _probes(model, dataset, renderer)
    _write_json(draft / PROBES_FILE, [asdict(probe) for probe in probes])
    _write_json(
        draft / PINS_FILE,
        {
            **pins,
            "dtype": _short(dtype),
            "steps": done.steps,
            "tokens": done.tokens,
            "learning_rate": done.learning_rate,
            "batch_tokens": done.batch_tokens,
            "kept_step": done.kept,
            "validation_loss": done.validation_loss,
        },
    )
    shutil.rmtree(job.bundle, ignore_errors=True)
    draft.rename(job.bundle)
    report(
        {
            "message": f"trained {done.steps} steps, {done.tokens:,} tokens, loss {done.loss:.3f}",
            "dropped": dropped,
        }
    )


def _pins(
    base: BaseModel, dataset: Dataset, config: TrainingConfig, prompt: Prompt | None
) -> dict[str, Any]:
    """All that decides what comes out; nothing in it differs when the same is trained again."""
    import hashlib

    pins: dict[str, Any] = {
        "base": base.name,
        "base_sha256": dict(base.pins()),
        "dataset": dataset.digest,
        "config": asdict(config),
        "config_digest": config.digest(),
        "prompt": None if prompt is None else asdict(prompt),
        "libraries": {name: metadata.version(name) for name in _LIBRARIES},
    }
    text = json.dumps(pins, sort_keys=True)
    return {**pins, "job": hashlib.sha256(text.encode()).hexdigest()}


def _probes(model: Any, dataset: Dataset, renderer: Any) -> list[Probe]:
    """`renderer` is the run's `items.Renderer`."""
    import torch

    from trainer.items import answer_of
    from trainer.methods.likelihood import log_probabilities
    from trainer.packing import Item, pack

    probes: list[Probe] = []
    device = next(model.parameters()).device
    rows = dataset.split("heldout") or dataset.split("train")
    for row in rows:
        whole = renderer(row.case, row.messages, answer_of(row), row.tools)
        if whole is None:
            continue
        # The prompt's own tokens tell adapters apart as well as the answer's.
        probed = Rendered(whole.ids, max(1, len(whole.ids) - _PROBED_TOKENS))
        packed = pack([Item((probed,))]).to(device)
        with torch.no_grad():
            adapted = log_probabilities(model, packed).tolist()
            with model.disable_adapter():
                plain = log_probabilities(model, packed).tolist()
        probes.append(
            Probe(
                messages=with_prompt(row.messages, renderer.prompt),
                ids=list(whole.ids),
                prompt_tokens=whole.answer_start,
                adapter=[round(each, 6) for each in adapted],
                base=[round(each, 6) for each in plain],
            )
        )
        if len(probes) == _PROBES:
            break
    return probes


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
    from trainer.loop import StoppedError

    try:
        carry_out(job, lambda line: _say(lines, line), stopping.is_set)
    except StoppedError:
        return STOPPED_STATUS
    except SluiceError as exc:
        _say(lines, {"error": exc.message, "param": exc.param, "code": exc.code})
        return FAILED_STATUS
    except (MemoryError, RuntimeError, OSError) as exc:
        _say(lines, {"error": _explain(exc)})
        return FAILED_STATUS
    return 0


def _watch_input(stopping: threading.Event) -> None:
    sys.stdin.read()
    stopping.set()


def _say(lines: TextIO, line: Mapping[str, Any]) -> None:
    lines.write(json.dumps(line) + "\n")
    lines.flush()


def _explain(exc: Exception) -> str:
    text = str(exc).strip().splitlines()[0] if str(exc).strip() else type(exc).__name__
    if isinstance(exc, MemoryError) or "out of memory" in text.lower():
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
