"""An evaluation from its beginning: what it can show, the answers of each way, the report."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any, Final, Literal

import msgspec

from rollout.artifacts import ArtifactStore
from rollout.engines import Engine
from rollout.errors import (
    ConfigError,
    EngineUnavailableError,
    InvalidInputError,
    NotFoundError,
    RefusedError,
    SluiceError,
    UnavailableError,
)
from rollout.evidence import Report
from rollout.routes import Route
from rollout.settings import Settings
from rollout.stores import Stores
from rollout.suites import Look, Suite, SuiteManifest, load_suite, sample_suite, suite_lines
from rollout.versions import Version
from trainer.build import Builder
from trainer.dataset import Dataset, leaks
from trainer.dataset import load as load_dataset
from trainer.evaluate import (
    Gateway,
    Graded,
    Marker,
    Marking,
    Messages,
    OnRow,
    answer_suite,
    decoding_of,
)
from trainer.prompting import best, candidates
from trainer.referee import Asked, Referee, whom
from trainer.reporting import Answers, Circumstances, Price, beforehand, fingerprint, make_report
from trainer.settings import TrainerSettings, gateway_address, gateway_key, suite_path
from trainer.suites import read_suite

log = logging.getLogger(__name__)

Purpose = Literal["training", "evaluation", "promotion"]
Say = Callable[[str], Awaitable[None]]
Progress = Callable[[str, int, int, float], Awaitable[None]]

_SETTINGS: Final = frozenset({"version", "against", "suite", "rows", "fresh", "purpose", "ways"})
WAYS: Final = ("base", "prompt", "larger")
_REPORTS_LOOKED_AT: Final = 200
_encoder = msgspec.json.Encoder(order="sorted")


@dataclass(frozen=True, slots=True)
class Wish:
    """What is to be evaluated. `dataset` is what prompts are looked for in, `fresh` asks anew."""

    route: Route
    version: Version
    parent: Version
    suite: Suite
    run: str = ""
    by: str = ""
    purpose: Purpose = "evaluation"
    dataset: Dataset | None = None
    fresh: bool = False
    ways: tuple[str, ...] = WAYS


@dataclass(frozen=True, slots=True)
class Voice:
    """How an evaluation speaks: a line, and what was asked of how many rows with the time left."""

    say: Say
    progress: Progress


class Evaluator:
    def __init__(
        self, stores: Stores, artifacts: ArtifactStore, settings: Settings, own: TrainerSettings
    ) -> None:
        self._stores = stores
        self._artifacts = artifacts
        self._settings = settings
        self._own = own
        self._engines: Mapping[str, Engine] = {each.name: each for each in settings.engine_list()}
        self._builder = Builder(stores, artifacts, settings)

    async def wish(self, config: Mapping[str, Any], route: str, run: str, by: str) -> Wish:
        """What a run of the kind "evaluation" asks for, looked up and checked."""
        if unknown := sorted(config.keys() - _SETTINGS):
            raise InvalidInputError(
                f"an evaluation has no setting {unknown[0]!r}", param=unknown[0]
            )
        version = await self._stores.rollouts.version(str(config["version"]))
        parent = await self._stores.rollouts.version(str(config["against"]))
        suite = await self.suite(route, config.get("suite"))
        if suite is None:
            raise InvalidInputError(
                f"{route} has no suite: `sluice suite add {route} FILE` registers one",
                param="suite",
            )
        if suite.vault and config.get("purpose") != "promotion":
            raise RefusedError(
                f"{suite.name} is in the vault, which is opened for a promotion alone"
            )
        return Wish(
            route=await self._stores.rollouts.route(route),
            version=version,
            parent=parent,
            suite=sample_suite(suite, int(config.get("rows") or 0)),
            run=run,
            by=by,
            purpose=config.get("purpose", "evaluation"),
            dataset=await self._newest_dataset(route, version),
            fresh=bool(config.get("fresh")),
            ways=tuple(config.get("ways", WAYS)),
        )

    async def suite(self, route: str, digest: str | None = None) -> Suite | None:
        """The suite that is named; else the route's file, else its newest registered one."""
        if digest is None:
            path = suite_path(self._settings, self._own, route)
            if path is not None:
                return await asyncio.to_thread(read_suite, route, path)
        found = await self._stores.suites.of_route(route)
        manifest = found if digest is None else await self._stores.suites.get(digest)
        return None if manifest is None else await asyncio.to_thread(self._load, manifest)

    async def evaluate(self, wish: Wish, voice: Voice) -> Report:
        """Ask every way and store the report. What it can show is said before the first row."""
        rules, suite = wish.route.evaluation, wish.suite
        churn = await self._churn(suite)
        stated = await asyncio.to_thread(beforehand, suite, rules, churn)
        await voice.say(f"{suite.name}: {stated}")
        markers = self._markers(wish)
        looks = await self._look(wish)
        notes = await self._leaking(wish)
        # Beside itself a version is asked twice, or it could not differ.
        alike = wish.version.name == wish.parent.name
        fresh = wish.fresh or alike or rules.latency_ratio is not None
        async with Marking(suite.scorers, markers) as marking:
            asking = _Asking(self, wish, voice, marking, fresh)
            answers = [
                await asking.ask("version", wish.version),
                await asking.ask("parent", wish.parent),
            ]
            more, prompt, said = await self._other_ways(asking, wish)
        # Resampling many rows takes seconds, in which a lease has to be kept.
        report = await asyncio.to_thread(
            make_report,
            suite,
            [*answers, *more],
            Circumstances(
                route=wish.route.name,
                rules=rules,
                stated=stated,
                now=_now(),
                looks=looks,
                by=wish.by,
                run=wish.run,
                prompt=prompt,
                decoding=decoding_of(wish.route.schema),
                notes=(*notes, *said),
            ),
        )
        await self._stores.reports.put(report)
        return report

    async def _look(self, wish: Wish) -> int:
        """Count the look before anything is asked, and keep what is; how many there were."""
        await self._builder.note_suite(wish.route.name, wish.suite, _now())
        await asyncio.to_thread(self._artifacts.put_document, suite_lines(wish.suite))
        return await self._stores.suites.look(
            Look(
                wish.suite.whole or wish.suite.digest,
                wish.version.name,
                wish.run,
                _now(),
                wish.by,
                wish.purpose,
            )
        )

    async def _other_ways(
        self, asking: "_Asking", wish: Wish
    ) -> tuple[list[Answers], Messages, list[str]]:
        """The base, the base under the best prompt, a larger route: none of them stops the report."""
        found: list[Answers] = []
        prompt: Messages = ()
        said: list[str] = []
        base = await self._bare_base(wish)
        if "base" in wish.ways and base is not None and base.name not in _asked(wish):
            await _attempt("the base", said, self._add(found, asking.ask("base", base)))
        if "prompt" in wish.ways and base is not None and wish.route.evaluation.prompt:
            prompt = await _attempt("a prompt", said, asking.best_prompt(base)) or ()
            if prompt:
                answers = asking.ask("prompt", base, prompt)
                await _attempt("the best prompt", said, self._add(found, answers))
        larger = wish.route.evaluation.larger
        if "larger" in wish.ways and larger:
            version = await _attempt(f"route {larger}", said, self._stable(larger))
            if version is not None:
                answers = asking.ask("larger", version)
                await _attempt(version.name, said, self._add(found, answers))
        return found, prompt, said

    async def _add(self, found: list[Answers], answers: Awaitable[Answers]) -> None:
        found.append(await answers)

    async def _stable(self, route: str) -> Version:
        rollout = await self._stores.rollouts.get(route)
        return await self._stores.rollouts.version(f"{route}@{rollout.stable}")

    async def _bare_base(self, wish: Wish) -> Version | None:
        """The route's first version that is the version's base alone."""
        versions = await self._stores.rollouts.versions(wish.route.name)
        for each in sorted(versions, key=lambda version: version.number):
            bare = each.adapter is None and each.prompt is None
            if bare and each.base == wish.version.base and each.engine == wish.version.engine:
                return each
        return None

    async def kept(self, fingerprint: str) -> Answers | None:
        document = await self._stores.suites.kept_answers(fingerprint)
        if document is None:
            return None
        try:
            content = await asyncio.to_thread(self._artifacts.document, document)
            answers = msgspec.json.decode(content, type=Answers)
        except (NotFoundError, UnavailableError, msgspec.MsgspecError) as exc:
            log.warning("kept answers are asked for anew: %s", exc)
            return None
        return replace(answers, document=document)

    async def keep(self, fingerprint: str, answers: Answers) -> Answers:
        content = _encoder.encode(replace(answers, document=None, price=None))
        document = await asyncio.to_thread(self._artifacts.put_document, content)
        await self._stores.suites.keep_answers(fingerprint, document)
        return replace(answers, document=document)

    def price(self, engine: str) -> Price | None:
        found = self._own.prices.get(engine)
        return None if found is None else Price(**found.model_dump())

    def gateway(self) -> Gateway:
        return Gateway(
            gateway_address(self._settings, self._own),
            gateway_key(self._settings, self._own),
            concurrency=self._own.concurrency,
        )

    def _markers(self, wish: Wish) -> dict[int, Marker]:
        gateway = self.gateway()
        through = Asked(gateway.url, gateway.key, "")
        return {
            place: Referee(scorer, whom(scorer, self._engines, wish.route.judge, through))
            for place, scorer in enumerate(wish.suite.scorers)
            if scorer.kind in ("judge", "label_model")
        }

    def _load(self, manifest: SuiteManifest) -> Suite:
        return load_suite(manifest, self._artifacts.document(manifest.digest))

    async def _churn(self, suite: Suite) -> float | None:
        """The share of rows that differed when this suite judged last."""
        for report in await self._stores.reports.list(None, _REPORTS_LOOKED_AT):
            if report.suite_digest == suite.digest and report.scores[0].total:
                return (report.gained + report.lost) / report.scores[0].total
        return None

    async def _newest_dataset(self, route: str, version: Version) -> Dataset | None:
        """What the version was trained on, else the route's newest dataset."""
        digest = version.dataset
        if digest is None:
            found = await self._stores.datasets.list(route)
            digest = found[0].digest if found else None
        if digest is None:
            return None
        try:
            return load_dataset(await asyncio.to_thread(self._artifacts.document, digest))
        except SluiceError as exc:
            log.warning("dataset %s cannot be read: %s", digest, exc.message)
            return None

    async def _leaking(self, wish: Wish) -> list[str]:
        """A word where the version was trained on what the suite asks: suites may be younger."""
        if wish.dataset is None or wish.version.dataset != wish.dataset.digest:
            return []
        asked = [row.messages for row in wish.suite.rows]
        found = await asyncio.to_thread(leaks, wish.dataset, asked)
        if not found:
            return []
        return [
            f"{wish.version.name} was trained on {len(found)} rows that this suite asks or nearly asks "
            f"(case {found[0]} for one): its score is too high"
        ]


class _Asking:
    """The way to the versions of one evaluation."""

    def __init__(
        self, evaluator: Evaluator, wish: Wish, voice: Voice, marking: Marking, fresh: bool
    ) -> None:
        self.marking = marking
        self._evaluator = evaluator
        self._wish = wish
        self._voice = voice
        self._fresh = fresh
        self._gateway = evaluator.gateway()

    async def ask(self, way: str, version: Version, prompt: Messages = ()) -> Answers:
        """A version's answers to all rows; those that it gave before, unless asked anew."""
        schema, suite = self._wish.route.schema, self._wish.suite
        decoding = decoding_of(schema, prompt)
        name = fingerprint({"weights": _weights(version), "suite": suite.digest, "how": decoding})
        label = "base under the best prompt" if prompt else way
        price = self._evaluator.price(version.engine)
        if not self._fresh and (kept := await self._evaluator.kept(name)) is not None:
            await self._voice.say(
                f"{version.name} ({label}) answered this suite on {kept.asked_at:%Y-%m-%d %H:%M}: "
                "not asked again"
            )
            return replace(kept, way=way, version=version.name, price=price)
        began = time.monotonic()
        graded = await answer_suite(
            self._gateway,
            version.name,
            suite,
            on_row=self._note(f"asking {version.name} ({label})"),
            marking=self.marking,
            prompt=prompt,
            schema=schema,
        )
        answers = Answers(way, version.name, tuple(graded), time.monotonic() - began, _now(), price)
        return await self._evaluator.keep(name, answers)

    async def best_prompt(self, base: Version) -> Messages:
        """The prompt under which the base is right most often on rows of the dataset's own."""
        wish = self._wish
        if wish.dataset is None:
            await self._voice.say("no prompt was looked for: there is no dataset to take it from")
            return ()
        clean = await asyncio.to_thread(_without_leaks, wish.dataset, wish.suite)
        found = candidates(
            wish.route.name, clean, wish.route.schema, wish.route.evaluation.prompt_rows
        )
        if found is None:
            await self._voice.say("no prompt was looked for: the dataset has too few rows")
            return ()
        rights: list[int] = []
        async with (
            Marking(wish.suite.scorers, {})
            if _plain(wish.suite)
            else Marking(found.suite.scorers, {}) as marking
        ):
            for number, prompt in enumerate(found.prompts, start=1):
                graded: Sequence[Graded] = await answer_suite(
                    self._gateway,
                    base.name,
                    found.suite,
                    on_row=self._note(f"prompt {number} of {len(found.prompts)}"),
                    marking=marking,
                    prompt=prompt,
                    schema=wish.route.schema,
                )
                rights.append(sum(each.right for each in graded))
        place = best(rights, found.prompts)
        await self._voice.say(
            f"prompts are right on {rights} of {len(found.suite.rows)} rows of the dataset; the "
            f"{place + 1}. is taken"
        )
        return found.prompts[place]

    def _note(self, what: str) -> OnRow:
        began = time.monotonic()

        async def note(done: int, total: int) -> None:
            spent = time.monotonic() - began
            await self._voice.progress(what, done, total, spent / done * (total - done))

        return note


async def _attempt(what: str, said: list[str], work: Awaitable[Any]) -> Any:
    """What comes of it, or None and a note where it comes to nothing."""
    try:
        return await work
    except (EngineUnavailableError, NotFoundError, ConfigError) as exc:
        said.append(f"{what} was not evaluated: {exc.message}")
        return None


def _asked(wish: Wish) -> frozenset[str]:
    return frozenset({wish.version.name, wish.parent.name})


def _plain(suite: Suite) -> bool:
    """Whether its scorers need no engine, so that they may also choose a prompt."""
    return all(scorer.kind not in ("judge", "label_model") for scorer in suite.scorers)


def _without_leaks(dataset: Dataset, suite: Suite) -> Dataset:
    leaking = set(leaks(dataset, [row.messages for row in suite.rows]))
    return replace(dataset, rows=tuple(row for row in dataset.rows if row.case not in leaking))


def _weights(version: Version) -> Mapping[str, Any]:
    return {
        "engine": version.engine,
        "base": version.base,
        "revision": version.base_revision,
        "adapter": version.adapter,
        "prompt": None if version.prompt is None else asdict(version.prompt),
        "sampling": dict(version.sampling),
    }


def _now() -> datetime:
    return datetime.now(UTC)
