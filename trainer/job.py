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
from trainer.dataset import Dataset, Example
from trainer.dataset import load as load_dataset
from trainer.rendering import Rendered, TooLongError, render, stop_ids, with_prompt

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
    from trainer import loop
    from trainer.adapter import save_adapter

    torch.set_num_threads(job.threads or os.cpu_count() or 1)
    config = TrainingConfig.from_mapping(job.config)
    base = BaseModel.open(job.base, Path(job.base_path))
    dataset = load_dataset(job.dataset.read_bytes())
    prompt = None if job.prompt is None else Prompt(**job.prompt)

    report({"message": f"loading {job.base}"})
    pins = _pins(base, dataset, config, prompt)
    device, dtype = loop.choose_device(config)
    model, tokenizer = loop.load_base(base, device, dtype)
    stops = stop_ids(tokenizer, model.generation_config)

    def rendered(rows: Sequence[Example]) -> list[Rendered]:
        return _render_rows(rows, prompt, tokenizer, stops, config.max_length)

    examples, validation = rendered(dataset.split("train")), rendered(dataset.split("validation"))
    if len(examples) < config.minimum_rows:
        raise InvalidInputError(
            f"{len(examples)} rows are left to train on, and {config.minimum_rows} are needed: the "
            f"others have more than max_length = {config.max_length} tokens",
            param="max_length",
        )
    report({"message": f"training on {len(examples)} rows ({device.type}, {_short(dtype)})"})
    model = loop.add_adapter(model, config)
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
    probes = _probes(model, dataset, prompt, tokenizer, stops, config)
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
        },
    )
    shutil.rmtree(job.bundle, ignore_errors=True)
    draft.rename(job.bundle)
    report(
        {
            "message": f"trained {done.steps} steps, {done.tokens:,} tokens, loss {done.loss:.3f}",
            "dropped": len(dataset.split("train")) - len(examples),
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


def _render_rows(
    rows: Sequence[Example],
    prompt: Prompt | None,
    tokenizer: Any,
    stops: frozenset[int],
    max_length: int,
) -> list[Rendered]:
    """Every row that fits. Raises MaskError at the first one that would teach something else."""
    done: list[Rendered] = []
    for row in rows:
        messages = with_prompt(row.messages, prompt)
        try:
            done.append(render(tokenizer, messages, row.gold, stops=stops, max_length=max_length))
        except TooLongError:
            continue
        except SluiceError as exc:
            exc.message = f"case {row.case}: {exc.message}"
            raise
    return done


def _probes(
    model: Any,
    dataset: Dataset,
    prompt: Prompt | None,
    tokenizer: Any,
    stops: frozenset[int],
    config: TrainingConfig,
) -> list[Probe]:
    import torch

    from trainer.methods import sft
    from trainer.packing import pack

    probes: list[Probe] = []
    device = next(model.parameters()).device
    rows = dataset.split("heldout") or dataset.split("train")
    for row in rows:
        messages = with_prompt(row.messages, prompt)
        try:
            whole = render(tokenizer, messages, row.gold, stops=stops, max_length=config.max_length)
        except TooLongError:
            continue
        # The prompt's own tokens tell adapters apart as well as the answer's.
        probed = Rendered(whole.ids, max(1, len(whole.ids) - _PROBED_TOKENS))
        packed = pack([probed]).to(device)
        with torch.no_grad():
            adapted = sft.log_probabilities(model, packed).tolist()
            with model.disable_adapter():
                plain = sft.log_probabilities(model, packed).tolist()
        probes.append(
            Probe(
                messages=messages,
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
