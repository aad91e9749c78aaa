"""What the benchmarks of training share: rows to an adapter, an engine to ask it, a report to print."""

import asyncio
import contextlib
import hashlib
import json
import os
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.processes import Processes, StartError, free_port
from rollout.datasets import Dataset
from rollout.evaluation import EvaluationRules
from rollout.evidence import Beside, Report, Score
from rollout.settings import VllmSection
from rollout.vllm import vllm_command, vllm_environment
from trainer.base import BaseModel
from trainer.bundle import PINS_FILE
from trainer.config import TrainingConfig
from trainer.evaluate import Gateway, Graded, Messages, answer_suite
from trainer.job import Job
from trainer.process import run_job
from trainer.reporting import Answers, Circumstances, beforehand, make_report
from trainer.suites import Suite

# What was trained is kept by what it was trained from, so a run that was cut short goes on.
CACHE = Path(".cache/bench/tuning")
ENGINE_PYTHON = Path(".venv-vllm/bin/python")
START_SECONDS = 400.0
MAX_RANK = 16
# A way in which rows were answered, for `make_report`: the first two are compared by the gate.
Way = tuple[str, str, Sequence[Graded], float]


@dataclass(frozen=True, slots=True)
class Adapter:
    """What a training run left. `facts` are the pins of its bundle, `seconds` how long it took."""

    folder: Path
    facts: Mapping[str, Any]
    seconds: float

    def __str__(self) -> str:
        facts = self.facts
        took = f"in {self.seconds:.0f} s" if self.seconds else "earlier"
        return (
            f"{facts['steps']} steps (those of step {facts['kept_step']} kept), "
            f"{facts['tokens']:,} tokens, learning rate {facts['learning_rate']:g}, "
            f"{facts['batch_tokens']} tokens a step; trained {took}"
        )


def train(
    base: BaseModel, dataset: Dataset, config: TrainingConfig, *, threads: int, cache: Path = CACHE
) -> Adapter:
    """Train by the trainer's own job, in a process of its own."""
    chosen = json.dumps([dataset.digest, config.digest(), dict(base.pins())], sort_keys=True)
    folder = cache / hashlib.sha256(chosen.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    job = Job(
        base=base.name,
        base_path=str(base.path),
        folder=str(folder),
        config=asdict(config),
        max_rank=MAX_RANK,
        threads=threads,
    )
    job.dataset.write_bytes(dataset.content)
    began = time.monotonic()
    trained = not (job.bundle / PINS_FILE).is_file()
    if trained:
        asyncio.run(run_job(job, _Said()))
    facts = json.loads((job.bundle / PINS_FILE).read_text(encoding="utf-8"))
    return Adapter(job.bundle, facts, time.monotonic() - began if trained else 0.0)


class _Said:
    """Passes on what a job says, and every twentieth of its steps."""

    def __init__(self) -> None:
        self._shown = 0

    async def __call__(self, line: Mapping[str, Any]) -> None:
        if "message" in line:
            say(f"  {line['message']}")
        step = line.get("progress")
        if step is None or (step["done"] - self._shown) * 20 < step["total"] > step["done"]:
            return
        self._shown = step["done"]
        say(
            f"  step {step['done']} of {step['total']}, loss {step['loss']:.3f}, "
            f"{step['tokens_per_second']:.0f} tokens/s, {step['eta']:.0f} s left"
        )


def say(line: str) -> None:
    """To the standard error: the standard output has the results alone."""
    print(line, file=sys.stderr, flush=True)


@dataclass(slots=True)
class Engine:
    """A vLLM that serves a base and the adapters that it is given."""

    url: str
    base: str
    adapters: dict[Path, str] = field(default_factory=dict)

    def load(self, adapter: Path) -> str:
        """The name under which the engine answers with the adapter."""
        if adapter not in self.adapters:
            name = f"adapter-{len(self.adapters) + 1}"
            body = {"lora_name": name, "lora_path": str(adapter.resolve())}
            request = urllib.request.Request(
                f"{self.url}/v1/load_lora_adapter",
                json.dumps(body).encode(),
                {"content-type": "application/json"},
            )
            with urllib.request.urlopen(request, timeout=120):
                self.adapters[adapter] = name
        return self.adapters[adapter]

    def ask(
        self, model: str, suite: Suite, *, prompt: Messages = (), schema: str | None = None
    ) -> tuple[list[Graded], float]:
        """The answers to a suite, asked as an evaluation asks, and the seconds that they took."""

        async def on_row(done: int, total: int) -> None:
            if done % 50 == 0 or done == total:
                say(f"  {model}: {done} of {total}")

        began = time.monotonic()
        gateway = Gateway(self.url, "none", timeout_seconds=600.0)
        graded = asyncio.run(
            answer_suite(gateway, model, suite, on_row=on_row, prompt=prompt, schema=schema)
        )
        return graded, time.monotonic() - began


@contextlib.contextmanager
def engine(base: BaseModel, *, threads: int, max_model_len: int = 1024) -> Iterator[Engine]:
    """A real vLLM for as long as the context lasts. Raises StartError where there is none."""
    if not ENGINE_PYTHON.exists():
        raise StartError("there is no vLLM here: run `make engine`")
    port = free_port()
    section = VllmSection(
        python=ENGINE_PYTHON.absolute(),
        served_name=base.name,
        max_model_len=max_model_len,
        max_rank=MAX_RANK,
    )
    CACHE.mkdir(parents=True, exist_ok=True)
    url = f"http://127.0.0.1:{port}"
    say("  vLLM starts")
    with Processes(CACHE) as processes:
        processes.start(
            "vllm",
            vllm_command(section, base.path.absolute(), port, gpu=False),
            core=None,
            ready=f"{url}/health",
            environ=vllm_environment(
                os.environ, Path(".cache/vllm").absolute(), gpu=False, threads=threads
            ),
            limit=START_SECONDS,
        )
        yield Engine(url, base.name)


def report(suite: Suite, ways: Sequence[Way], rules: EvaluationRules) -> Report:
    """What the trainer would report: the first way against the second, and beside the others."""
    now = datetime.now(UTC)
    answers = [
        Answers(way, version, tuple(graded), seconds, now) for way, version, graded, seconds in ways
    ]
    about = Circumstances(suite.name, rules, beforehand(suite, rules, None), now)
    return make_report(suite, answers, about)


def table(found: Report) -> str:
    """The scores of all ways, and the first one beside each of the others."""
    first, parent = found.scores[0], found.scores[1]
    gain = first.mean - parent.mean
    counts = (found.gained, found.lost, found.p_value)
    beside = {each.version: each for each in found.beside}
    beside[parent.version] = Beside(
        parent.way, parent.version, gain, found.low or gain, found.high or gain, *counts
    )
    metric = "right" if found.metric == "auto" else found.metric.replace("_", " ")
    lines = [
        f"| | {metric} | 95 % | {first.version}: gained, lost | difference, 95 % | p |",
        "|---|---|---|---|---|---|",
    ]
    for score in found.scores:
        more = "| | | |"
        if each := beside.get(score.version):
            more = f"| {each.gained}, {each.lost} | {each.low:+.1%} to {each.high:+.1%} "
            more += f"| {each.p_value:.2g} |"
        lines.append(
            f"| {score.version} | {_mean(score)} | {score.low:.1%} to {score.high:.1%} {more}"
        )
    return "\n".join(lines)


def describe(name: str, dataset: Dataset) -> str:
    """How many rows there are for what, and what was left out."""
    splits = Counter(row.split for row in dataset.rows)
    dropped = Counter(each.reason for each in dataset.dropped)
    left_out = ", ".join(f"{count} that {reason}" for reason, count in sorted(dropped.items()))
    return (
        f"{name}: {splits['train']} rows to learn from, {splits['validation']} to choose the step "
        f"by, {splits['heldout']} held out; left out: {left_out or 'none'}"
    )


def setting(text: str) -> tuple[str, Any]:
    """`epochs=3` for the training, as an option of the command line."""
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def circumstances() -> str:
    """How busy the machine is: times mean nothing without it."""
    load = ", ".join(f"{each:.1f}" for each in os.getloadavg())
    return f"{os.cpu_count()} cores, load average {load}, {time.strftime('%Y-%m-%d %H:%M')}"


def _mean(score: Score) -> str:
    if score.metrics.keys() <= {"auto"}:
        return f"{score.mean:.1%} ({score.correct} of {score.total})"
    return f"{score.mean:.1%}"
