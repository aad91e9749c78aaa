"""The external backend: a command of the operator's trains, and we admit what it leaves.

The command is a template, split into words before anything is put into it, so no path or setting
can add a word:

    {dataset}     rows to train on, JSONL as TRL reads it (prompt, completion or chosen, rejected)
    {messages}    the same as whole conversations, as Axolotl and others read them (sft alone)
    {validation}  rows to watch the loss on, in the form of {dataset}
    {base}        the folder of the base
    {config}      the run's settings, JSON
    {output}      the empty folder to leave the adapter in
"""

import json
import os
import shlex
import shutil
import string
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rollout.adapters import CONFIG_FILE, WEIGHTS_FILE, read_config
from rollout.datasets import Dataset, Split
from rollout.errors import InvalidInputError, SluiceError, UnservableError
from rollout.versions import Prompt
from trainer.config import TrainingConfig
from trainer.items import answer_of
from trainer.rendering import with_prompt

LOG_FILE = "external.log"
PLACES = ("dataset", "messages", "validation", "base", "config", "output")
_NEEDED = frozenset({"dataset", "messages"}), frozenset({"output"})
_LOOK_SECONDS = 0.2
_STOP_SECONDS = 15.0
# What a person needs of a log lies at its end.
_TOLD_LINES = 5


@dataclass(frozen=True, slots=True)
class Command:
    """`memory_gb` of private memory for each of its processes, 0 for no limit."""

    template: str
    seconds: float = 86_400.0
    memory_gb: float = 0.0
    log_mb: float = 100.0


class ExternalError(SluiceError):
    """The command failed, or took too long; the message says what it said last."""

    code = "external_failed"


class StoppedExternallyError(Exception):
    """Asked to stop; the command was ended. It begins anew when the run is taken up again."""


def check_command(template: str) -> list[str]:
    """The words of the template. Raises InvalidInputError where a place is unknown or missing."""
    if not template.strip():
        raise InvalidInputError(
            "backend = 'external' needs a command: set [trainer.external] command", param="backend"
        )
    try:
        words = shlex.split(template)
        named = {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
    except ValueError as exc:
        raise InvalidInputError(
            f"trainer.external.command cannot be read: {exc}", param="trainer.external.command"
        ) from exc
    if unknown := sorted(named.difference(PLACES)):
        raise InvalidInputError(
            f"trainer.external.command: there is no {{{unknown[0]}}}; there are "
            + ", ".join(f"{{{each}}}" for each in PLACES),
            param="trainer.external.command",
        )
    if not all(named & one_of for one_of in _NEEDED):
        raise InvalidInputError(
            "trainer.external.command must name {output} and {dataset} or {messages}",
            param="trainer.external.command",
        )
    return words


def train_externally(
    command: Command,
    folder: Path,
    base: Path,
    dataset: Dataset,
    prompt: Prompt | None,
    config: TrainingConfig,
    *,
    on_line: Callable[[str], None],
    should_stop: Callable[[], bool],
) -> Path:
    """Run the command in `folder`; the folder that it left its adapter in.

    Raises ExternalError where it fails or takes longer than it may, StoppedExternallyError where
    `should_stop` says so; its processes are ended then.
    """
    words = check_command(command.template)
    shutil.rmtree(folder, ignore_errors=True)
    output = folder / "output"
    output.mkdir(parents=True)
    places = {"base": str(base), "output": str(output)}
    for name, rows in _files(dataset, prompt, config).items():
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        places[name] = str(path)
    settings = folder / "config.json"
    settings.write_text(json.dumps(asdict(config), indent=1), encoding="utf-8")
    filled = [word.format(**places, config=settings) for word in words]
    _run(filled, folder, command, on_line, should_stop)
    return output


def admit(left: Path, draft: Path, base_name: str, base_path: Path) -> None:
    """Put what an external trainer left into `draft`, as one of our own would look.

    Raises UnservableError where it is no adapter of that base.
    """
    missing = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if not (left / name).is_file()]
    if missing:
        there = ", ".join(sorted(each.name for each in left.iterdir())) or "nothing"
        raise UnservableError(
            f"the external trainer left no {missing[0]} in {{output}} but {there}: let it save the "
            "adapter there, unmerged, as PEFT does",
            param="trainer.external.command",
        )
    config = read_config(left)
    trained_on = config.get("base_model_name_or_path")
    if trained_on not in (base_name, str(base_path)):
        raise UnservableError(
            f"base_model_name_or_path = {trained_on!r}: the external trainer trained on another base "
            f"than {{base}}, {base_path}",
            param="base_model_name_or_path",
        )
    config["base_model_name_or_path"] = base_name
    if isinstance(config.get("target_modules"), list):
        config["target_modules"] = sorted(config["target_modules"])
    shutil.copyfile(left / WEIGHTS_FILE, draft / WEIGHTS_FILE)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (draft / CONFIG_FILE).write_text(text, encoding="utf-8")


def _files(
    dataset: Dataset, prompt: Prompt | None, config: TrainingConfig
) -> Mapping[str, Sequence[Mapping[str, Any]]]:
    files = {
        "dataset": list(_rows(dataset, "train", prompt, config)),
        "validation": list(_rows(dataset, "validation", prompt, config)),
        "messages": [],
    }
    if config.method in ("sft", "distill"):
        files["messages"] = [
            {"messages": [*row["prompt"], *row["completion"]]} for row in files["dataset"]
        ]
    return files


def _rows(
    dataset: Dataset, split: Split, prompt: Prompt | None, config: TrainingConfig
) -> Iterator[dict[str, Any]]:
    """In TRL's conversational forms."""

    def said(text: str) -> list[dict[str, Any]]:
        return [{"role": "assistant", "content": text}]

    def asked(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        return [dict(each) for each in with_prompt(messages, prompt)]

    match config.method:
        case "sft" | "distill":
            for row in dataset.split(split):
                answer = {k: v for k, v in answer_of(row).items() if k != "weight"}
                yield _with_tools(row.tools, prompt=asked(row.messages), completion=[answer])
        case "dpo" | "ipo" | "orpo":
            for pair in dataset.preferences(split):
                yield _with_tools(
                    pair.tools,
                    prompt=asked(pair.prompt),
                    chosen=said(pair.chosen),
                    rejected=said(pair.rejected),
                )
        case "kto":
            for one in dataset.unpaired(split):
                yield _with_tools(
                    one.tools,
                    prompt=asked(one.prompt),
                    completion=said(one.answer),
                    label=one.desirable,
                )


def _with_tools(tools: Sequence[Mapping[str, Any]], **row: Any) -> dict[str, Any]:
    return {**row, "tools": [dict(each) for each in tools]} if tools else row


def _run(
    words: Sequence[str],
    folder: Path,
    command: Command,
    on_line: Callable[[str], None],
    should_stop: Callable[[], bool],
) -> None:
    log = folder / LOG_FILE
    supervisor = str(Path(__file__).with_name("supervise.py"))
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, supervisor, str(int(command.memory_gb * 1e9)), *words],
            cwd=folder,
            env=_environment(folder),
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            _watch(process, log, command, on_line, should_stop)
        finally:
            _end(process)
    if last := _said(log, 1):
        on_line(last)
    if process.returncode:
        raise ExternalError(
            f"the external trainer ended with status {process.returncode}: {_last_words(log)}"
        )


def _watch(
    process: "subprocess.Popen[bytes]",
    log: Path,
    command: Command,
    on_line: Callable[[str], None],
    should_stop: Callable[[], bool],
) -> None:
    """Pass on what it says until it ends. Raises where it may go on no longer."""
    until = time.monotonic() + command.seconds
    said = ""
    while process.poll() is None:
        if should_stop():
            raise StoppedExternallyError
        if time.monotonic() > until:
            raise ExternalError(
                f"the external trainer took longer than {command.seconds:g} s and was ended: "
                f"{_last_words(log)}"
            )
        if log.stat().st_size > command.log_mb * 1e6:
            raise ExternalError(
                f"the external trainer wrote more than {command.log_mb:g} MB to its log and was "
                f"ended: {_last_words(log)}"
            )
        if (now := _said(log, 1)) and now != said:
            said = now
            on_line(said)
        time.sleep(_LOOK_SECONDS)


def _environment(folder: Path) -> dict[str, str]:
    """Ours without our keys, which are nothing that a foreign command needs."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLUICE_")}
    return {**kept, "SLUICE_RUN_FOLDER": str(folder), "HF_HUB_OFFLINE": "1"}


def _end(process: "subprocess.Popen[bytes]") -> None:
    if process.stdin is not None:
        process.stdin.close()
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _last_words(log: Path) -> str:
    return _said(log, _TOLD_LINES) or "it said nothing"


def _said(log: Path, lines: int) -> str:
    with log.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
        text = file.read().decode("utf-8", "replace")
    # Progress bars write over their line.
    said = [line.strip() for line in text.replace("\r", "\n").splitlines() if line.strip()]
    return " | ".join(said[-lines:])[-1000:]
