"""The story that the demo tells, stage by stage, on the running system."""

import asyncio
import itertools
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep
from typing import Any

from rich.progress import Progress, TaskID

from rollout.client import ControlClient
from rollout.control.views import RolloutView
from rollout.errors import ConflictError, UnavailableError
from rollout.evidence import Score
from rollout.runs import RunEvent, TrainingRun
from rollout.state import Promoted, RolledBack
from trainer.demo.application import Application
from trainer.demo.people import People
from trainer.demo.results import Candidate, Results
from trainer.demo.sentences import Sentence, prompts, suite_lines, suite_rows
from trainer.evaluate import Gateway, Graded, answer_suite, score
from trainer.suites import Suite, make_suite, read_suite

_ME = "demo"
# The shadow may be behind by this long before the demo goes on without its last pairs.
_SHADOW_SECONDS = 60.0
# The controller looks about once a second.
_VERDICT_SECONDS = 20.0
_RESIDENT_SECONDS = 300.0
_POLL_SECONDS = 0.3
_BATCH = 8


@dataclass(frozen=True, slots=True)
class Scale:
    """How much of everything.

    `requests` for the first trial, which the labels come from; `round` for each look at a later
    one, of which there are at most `rounds` before the canary. `choice` training sentences choose
    the prompt, and `heldout` others say how good each version is.
    """

    requests: int = 480
    round: int = 60
    rounds: int = 8
    heldout: int = 300
    choice: int = 60
    epochs: int = 2


class Story:
    """Each method is a stage; they are told in the order in which they stand here."""

    def __init__(
        self,
        *,
        route: str,
        control: ControlClient,
        labelers: ControlClient,
        gateway: Gateway,
        application: Application,
        runner: asyncio.Runner,
        sentences: Sequence[Sentence],
        data: Path,
        scale: Scale,
        progress: Progress,
    ) -> None:
        self._route = route
        self._control = control
        self._gateway = gateway
        self._application = application
        self._runner = runner
        self._data = data
        self._scale = scale
        self._progress = progress
        self._people = People(labelers, route, list(sentences))
        self._train = [sentence for sentence in sentences if sentence.split == "train"]
        self._heldout = [s for s in sentences if s.split == "heldout"][: scale.heldout]
        # Customers never ask the same twice, until they have asked everything.
        self._next = itertools.cycle(self._train)
        policy = control.route(route).route.policy
        self.results = Results(route, policy, len(self._heldout))

    def begin(self) -> None:
        """Stage 0: whatever was tried before, the bare base is stable."""
        with self._stage("the bare base is stable"):
            suite = self._data / "suites" / f"{self._route}.jsonl"
            suite.parent.mkdir(parents=True, exist_ok=True)
            suite.write_text(suite_lines(suite_rows(self._heldout)), encoding="utf-8")
            view = self._view()
            if view.candidate is not None:
                self._change("rollback", "the demo begins")
            if self._view().stable != f"{self._route}@1":
                self._change("propose", "the demo begins", version=f"{self._route}@1", force=True)
                self._change("promote", "the demo begins", force=True)
            self._add(f"{self._route}@1", "the bare base", "was stable")
            self._evaluate(self.results.candidates[0])

    def try_prompt(self) -> None:
        """Stage 1: a prompt with examples answers in the shadow; people label what differs."""
        with self._stage("the best prompt with examples"):
            version = self._control.register(
                self._route,
                prompt={"messages": self._best_prompt(), "mode": "replace_system"},
                note="the instruction with examples of each class",
            )
        with self._stage("its shadow, and people's labels"):
            candidate = self._add(version.name, "the best prompt with examples")
            self._evaluate(candidate)
            self._change("propose", "do examples help?", version=version.name)
            self._serve(candidate, self._scale.requests)
            candidate.end = self._withdraw(candidate, "its labels are what we wanted")

    def train(self) -> Candidate | None:
        """Stage 2: an adapter is trained on the labels; None where it did not win."""
        with self._stage("an adapter trained, evaluated and proved"):
            config = {"epochs": self._scale.epochs, "heldout": 0.0}
            run = self._follow(self._control.start_run(self._route, config))
            if run.version is None:
                self._say(f"no adapter came out of it: {run.reason}")
                return None
            candidate = self._add(run.version, "the adapter of the labels")
            if run.report is not None:
                scores = {each.version: each for each in self._control.report(run.report).scores}
                candidate.score = scores.get(run.version)
            if run.state != "proposed":
                candidate.end = f"not proposed: {run.reason}"
                return None
            return candidate

    def roll_out(self, candidate: Candidate) -> bool:
        """Stage 3: shadow, 10 %, 50 %, promoted. Returns whether it got that far."""
        with self._stage("the adapter in the shadow"):
            for _ in range(self._scale.rounds):
                self._serve(candidate, self._scale.round)
                if self._verdict() in ("pass", "ended"):
                    break
        for percent in (10.0, 50.0):
            with self._stage(f"the adapter on {percent:.0f} %"):
                if self._view().candidate is None or self._verdict() != "pass":
                    candidate.end = self._withdraw(candidate, "the gate did not pass")
                    return False
                self._change("canary", "its gate has passed", percent=percent)
                self._serve(candidate, self._scale.round)
        with self._stage("the adapter promoted"):
            if self._verdict() == "ended":
                candidate.end = self._withdraw(candidate, "")
                return False
            self._change("promote", "its gate has passed on 50 %")
            candidate.end = "promoted"
        return True

    def spoil(self, good: Candidate) -> None:
        """Stage 4: a spoiled adapter is forced in, and the gate takes it out again."""
        with self._stage("a spoiled adapter forced in, and rolled back by the gate"):
            path = self._control.version(good.version).version.adapter_path
            if path is None:
                raise UnavailableError(f"{good.version} has no adapter to spoil")
            spoiled = spoil_adapter(Path(path), self._data / "demo")
            version = self._control.register(
                self._route, adapter_path=str(spoiled), note="spoiled on purpose"
            )
            candidate = self._add(version.name, "that adapter, spoiled")
            self._change("propose", "force it in", version=version.name, force=True)
            self._change("canary", "force it in", percent=20.0, force=True)
            self._evaluate(candidate)
            for _ in range(self._scale.rounds):
                self._serve(candidate, self._scale.round)
                if self._verdict() == "ended":
                    break
            candidate.end = self._withdraw(candidate, "the gate has not seen it")

    # What the stages are made of

    def _best_prompt(self) -> Sequence[Mapping[str, str]]:
        """The prompt under which the base is right most often on some training sentences."""
        sample = self._train[-self._scale.choice :]
        rights: list[int] = []
        found = prompts(self._train)
        for number, prompt in enumerate(found, start=1):
            suite = make_suite(self._route, suite_rows(sample, prompt))
            graded, _ = self._ask(f"{self._route}@1", suite, f"prompt {number} of {len(found)}")
            rights.append(sum(each.right for each in graded))
        self._say(f"right on {rights} of {len(sample)} training sentences; the best one is taken")
        return found[rights.index(max(rights))]

    def _serve(self, candidate: Candidate, requests: int) -> None:
        """Customers ask; people label what the shadow finds, until it has caught up."""
        sentences = list(itertools.islice(self._next, requests))
        before = candidate.pairs.total if candidate.pairs else 0
        with self._bar("  customers ask", requests) as advance:
            traffic = self._runner.run(self._application.ask(sentences, advance))
        self.results.requests += traffic.sent
        self.results.failed += traffic.failed
        arms = ", ".join(f"{count} by {arm}" for arm, count in sorted(traffic.arms.items()))
        self._say(f"answered: {arms}; failed: {traffic.failed}")
        self._label(candidate, before + traffic.sent - traffic.failed)

    def _label(self, candidate: Candidate, expected: int) -> None:
        """Label until the trial has `expected` pairs and no case is open, or the trial is over."""
        labels = self._people.labels
        moved = monotonic()
        seen = -1
        with self._bar("  people label", expected) as advance:
            while True:
                found = self._people.label(_BATCH)
                view = self._view()
                if view.candidate != candidate.version or view.evidence is None:
                    break
                candidate.pairs = view.evidence.pairs
                total = view.evidence.pairs.total
                if found or total != seen:
                    moved = monotonic()
                advance(max(0, total - max(seen, 0)))
                seen = total
                if not found:
                    if total >= expected or monotonic() - moved > _SHADOW_SECONDS:
                        break
                    sleep(_POLL_SECONDS)
        candidate.labels += self._people.labels - labels

    def _verdict(self) -> str:
        """pass, inconclusive, or "ended" where the trial was rolled back; waits for a fresh one."""
        until = monotonic() + _VERDICT_SECONDS
        while True:
            view = self._view()
            if view.candidate is None:
                return "ended"
            pairs = view.evidence.pairs if view.evidence else None
            for verdict in view.verdicts:
                decided = pairs.wins + pairs.losses + pairs.ties if pairs else 0
                # An older verdict has not seen the last labels; a failed one is about to end it.
                fresh = verdict.gate == "pairs" and verdict.units >= decided
                if fresh and verdict.outcome != "fail":
                    self._say(f"gate: {verdict.outcome}, {verdict.reason}")
                    return verdict.outcome
            if monotonic() > until:
                return "inconclusive"
            sleep(_POLL_SECONDS)

    def _withdraw(self, candidate: Candidate, reason: str) -> str:
        """End the trial if it still runs; returns how it ended."""
        if self._verdict() != "ended" and (view := self._view()).candidate == candidate.version:
            # At that revision only: the gate may be rolling it back at this very moment.
            with suppress(ConflictError):
                self._change("rollback", reason, revision=view.rollout.revision)
        for entry in self._control.history(self._route):
            if isinstance(entry.event, RolledBack | Promoted):
                gate = entry.event.by == "sluice"
                return f"{'rolled back by its gate' if gate else 'withdrawn'}: {entry.event.reason}"
        return reason

    def _evaluate(self, candidate: Candidate) -> None:
        """Ask a version every held-out sentence, constrained to the three classes."""
        self._wait_resident(candidate.version)
        suite = read_suite(self._route, self._data / "suites" / f"{self._route}.jsonl")
        what = f"{candidate.version} on held-out sentences"
        graded, seconds = self._ask(candidate.version, suite, what)
        candidate.score = score(candidate.version, graded, seconds)
        self._say(f"{candidate.version} is right on {_percent(candidate.score)}")

    def _ask(self, version: str, suite: Suite, what: str) -> tuple[list[Graded], float]:
        """A version's answers to every row, and how many seconds they took."""
        began = monotonic()
        with self._bar(f"  {what}", len(suite.rows)) as advance:

            async def on_row(_done: int, _total: int) -> None:
                advance()

            graded = self._runner.run(answer_suite(self._gateway, version, suite, on_row=on_row))
        return graded, monotonic() - began

    def _wait_resident(self, version: str) -> None:
        until = monotonic() + _RESIDENT_SECONDS
        while not self._control.version(version).resident_on:
            if monotonic() > until:
                raise UnavailableError(
                    f"no engine serves {version} after {_RESIDENT_SECONDS:.0f} s: see "
                    "`sluice rollout status` and the engine's log"
                )
            sleep(_POLL_SECONDS)

    def _follow(self, run: TrainingRun) -> TrainingRun:
        """Show a run's progress until it has ended."""
        bars: dict[str, TaskID] = {}
        for item in self._control.follow_run(run.id):
            if isinstance(item, TrainingRun):
                return item
            self._show(item, bars)
        raise UnavailableError(f"the run {run.id} was lost from sight")

    def _show(self, event: RunEvent, bars: dict[str, TaskID]) -> None:
        if event.total == 0:
            self._say(event.message)
            return
        if event.stage not in bars:
            bars[event.stage] = self._progress.add_task(f"  {event.stage}", total=event.total)
        self._progress.update(bars[event.stage], completed=event.done, total=event.total)

    def _change(self, verb: Any, reason: str, **fields: Any) -> None:
        changed = self._control.change(
            self._route, verb, reason=reason, patience=_RESIDENT_SECONDS, **fields
        )
        self._control.wait_until_served(changed.catalog_revision, 10.0)
        self._say(f"{verb}: {reason}")

    def _view(self) -> RolloutView:
        return self._control.rollout(self._route)

    def _add(self, version: str, what: str, end: str = "") -> Candidate:
        candidate = Candidate(version, what, end=end)
        self.results.candidates.append(candidate)
        return candidate

    def _say(self, line: str) -> None:
        self._progress.console.print(f"  {line}", highlight=False)

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        self._progress.console.print(f"[bold]{name}[/bold]")
        began = monotonic()
        try:
            yield
        finally:
            self.results.stages.append((name, monotonic() - began))

    @contextmanager
    def _bar(self, name: str, total: int) -> Iterator[Callable[..., None]]:
        task = self._progress.add_task(name, total=total)

        def advance(steps: int = 1) -> None:
            self._progress.update(task, advance=steps)

        try:
            yield advance
        finally:
            self._progress.remove_task(task)


def spoil_adapter(adapter: Path, folder: Path) -> Path:
    """A copy of an adapter that pushes away from what was learned: its update is reversed.

    It is as servable as the good one, so nothing but its answers tells them apart.
    """
    # Heavy, and of no use to any other stage.
    from safetensors.torch import load_file, save_file

    target = folder / f"spoiled-{adapter.name[:20]}"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    shutil.copy(adapter / "adapter_config.json", target)
    weights = load_file(adapter / "adapter_model.safetensors")
    spoiled = {
        name: -2.0 * tensor if ".lora_B." in name else tensor for name, tensor in weights.items()
    }
    save_file(spoiled, target / "adapter_model.safetensors")
    return target


def _percent(score: Score) -> str:
    return f"{score.accuracy:.1%} of {score.total} held-out sentences"
