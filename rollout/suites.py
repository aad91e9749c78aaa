"""A suite: rows with known answers and the scorers that mark them, immutable, named by its sha256."""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime
from typing import Any, Final, Literal, get_args

import msgspec

from rollout.errors import InvalidInputError

ScorerKind = Literal[
    "auto",
    "exact",
    "normalised",
    "json_valid",
    "field_f1",
    "field_precision",
    "field_recall",
    "tool_call",
    "similarity",
    "label_model",
    "judge",
    "python",
]
KINDS: Final[tuple[ScorerKind, ...]] = get_args(ScorerKind)
# Marks that are shares, where nearly right counts as right from here on.
_THRESHOLDS: Final[Mapping[ScorerKind, float]] = {"similarity": 0.9, "judge": 0.5}
_LONGEST_LINE: Final = 4 * 2**20
_LONGEST_CODE: Final = 64 * 2**10
_MOST_ROWS: Final = 100_000
_FIELDS: Final = frozenset(
    {"id", "messages", "gold", "choices", "schema", "tags", "tools", "calls"}
)
_VERSION: Final = 1


@dataclass(frozen=True, slots=True)
class Scorer:
    """How an answer is marked, in [0, 1]; from `threshold` on it is right.

    `schema` is for json_valid, where it is not the row's own. `engine` (one of [[engines]]) and
    `model` are who label_model and judge ask; `prompt` is what they are told, `labels` what the
    label model chooses from and `passing` those that are right. `code` is python's: a text that
    defines `grade(sample, item)`; `seconds` and `memory_mb` are its limits for each row.
    """

    kind: ScorerKind = "auto"
    threshold: float = 1.0
    schema: str | None = None
    engine: str | None = None
    model: str | None = None
    prompt: str | None = None
    labels: tuple[str, ...] = ()
    passing: tuple[str, ...] = ()
    code: str = ""
    seconds: float = 5.0
    memory_mb: int = 512


AUTO: Final = Scorer()


@dataclass(frozen=True, slots=True)
class SuiteRow:
    """`choices`, or the text of a JSON `schema`, constrain what the engine may answer.

    `tags` name the slices that the row belongs to. `tools` are offered to the model, and `calls`
    are the tool calls that are right.
    """

    id: str
    messages: tuple[Mapping[str, Any], ...]
    gold: str
    choices: tuple[str, ...] | None = None
    schema: str | None = None
    tags: tuple[str, ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    calls: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Suite:
    """`name` says where it comes from and which bytes it is: `review-triage:1f0c…`.

    The first scorer is the main one. A part of a suite has a digest of its own; `whole` is that of
    the suite it was taken from, by which looks are counted.
    """

    name: str
    rows: tuple[SuiteRow, ...]
    scorers: tuple[Scorer, ...] = (AUTO,)
    digest: str = ""
    whole: str = ""
    vault: bool = False

    @property
    def tags(self) -> tuple[str, ...]:
        return tuple(sorted({tag for row in self.rows for tag in row.tags}))


@dataclass(frozen=True, slots=True)
class SuiteManifest:
    """A registered suite without its rows. `digest` names the document that holds it."""

    digest: str
    name: str
    route: str
    rows: int
    scorers: tuple[Scorer, ...]
    created_at: datetime
    created_by: str = ""
    vault: bool = False
    note: str = ""
    tags: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Look:
    """That a suite was asked to judge a version. It counts from the moment it was asked for."""

    suite: str
    version: str
    run: str
    at: datetime
    by: str = ""
    purpose: Literal["training", "evaluation", "promotion"] = "evaluation"


@dataclass(frozen=True, slots=True)
class SuiteStanding:
    """A suite with what it was used for. `judged` are the versions, `allowed` how many may be."""

    manifest: SuiteManifest
    looks: tuple[Look, ...]
    judged: int
    allowed: int

    @property
    def worn(self) -> bool:
        return self.judged > self.allowed


def read_rows(content: bytes, where: str) -> list[SuiteRow]:
    """Read `{"id", "messages", "gold", …}` lines. Raises InvalidInputError that names the line."""
    rows: list[SuiteRow] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        row = _read_row(line, f"{where}, line {number}")
        if row.id in seen:
            raise InvalidInputError(
                f"{where}, line {number}: the id {row.id!r} occurs more than once; it is that of line "
                f"{seen[row.id]} too",
                param="id",
            )
        seen[row.id] = number
        rows.append(row)
        if len(rows) > _MOST_ROWS:
            raise InvalidInputError(f"{where} has more than {_MOST_ROWS:,} rows")
    if not rows:
        raise InvalidInputError(f"{where} holds no rows")
    return rows


def make_suite(
    route: str,
    rows: Iterable[SuiteRow],
    scorers: Sequence[Scorer] = (AUTO,),
    *,
    vault: bool = False,
) -> Suite:
    ordered = tuple(sorted(rows, key=lambda row: row.id))
    suite = Suite("", ordered, tuple(scorers) or (AUTO,), vault=vault)
    digest = hashlib.sha256(suite_lines(suite)).hexdigest()
    return Suite(f"{route}:{digest[:20]}", ordered, suite.scorers, digest, digest, vault)


def suite_lines(suite: Suite) -> bytes:
    """The suite's document: a line on its scorers, then a row a line, canonical."""
    head = {"suite": _VERSION, "scorers": [_plain(each) for each in suite.scorers]}
    lines = [head, *(_plain(row) for row in suite.rows)]
    return b"".join(_line(each) for each in lines)


def load_suite(manifest: SuiteManifest, content: bytes) -> Suite:
    """The suite that a document holds."""
    head, _, rest = content.partition(b"\n")
    scorers = tuple(read_scorer(each) for each in json.loads(head)["scorers"])
    rows = tuple(read_rows(rest, f"suite {manifest.name}"))
    digest = manifest.digest
    return Suite(manifest.name, rows, scorers, digest, digest, manifest.vault)


def sample_suite(suite: Suite, rows: int) -> Suite:
    """At most so many of its rows, the same ones each time; 0 is all of them."""
    if not rows or rows >= len(suite.rows):
        return suite
    by_chance = sorted(suite.rows, key=lambda row: hashlib.sha256(row.id.encode()).digest())
    part = make_suite("", by_chance[:rows], suite.scorers)
    return Suite(
        f"{suite.name}/{rows}", part.rows, suite.scorers, part.digest, suite.digest, suite.vault
    )


def read_scorer(values: Mapping[str, Any]) -> Scorer:
    """A scorer as JSON or the command line gives it. Raises InvalidInputError."""
    known = {each.name for each in fields(Scorer)}
    if unknown := sorted(values.keys() - known):
        raise InvalidInputError(f"a scorer has no {unknown[0]!r}", param=f"scorers.{unknown[0]}")
    kind = values.get("kind", "auto")
    if kind not in KINDS:
        raise InvalidInputError(
            f"there is no scorer {kind!r}: there are {', '.join(KINDS)}", param="scorers.kind"
        )
    try:
        scorer = msgspec.convert(
            {"threshold": _THRESHOLDS.get(kind, 1.0), **values, "kind": kind}, Scorer
        )
    except msgspec.ValidationError as exc:
        raise InvalidInputError(f"scorer {kind}: {exc}", param="scorers") from exc
    for name, problem in _scorer_problems(scorer):
        raise InvalidInputError(f"scorer {kind}: {problem}", param=f"scorers.{name}")
    return scorer


def _scorer_problems(scorer: Scorer) -> Iterable[tuple[str, str]]:
    if not (math.isfinite(scorer.threshold) and 0 < scorer.threshold <= 1):
        yield "threshold", "threshold must lie in (0, 1]"
    if not 0 < scorer.seconds <= 600:
        yield "seconds", "seconds must lie in (0, 600]"
    if not 64 <= scorer.memory_mb <= 65536:
        yield "memory_mb", "memory_mb must lie in [64, 65536]"
    if scorer.kind == "python" and not scorer.code.strip():
        yield "code", "give the file that defines grade(sample, item), as python:FILE"
    if len(scorer.code) > _LONGEST_CODE:
        yield "code", f"the code is longer than {_LONGEST_CODE // 1024} KiB"
    if scorer.kind == "label_model" and not set(scorer.passing) & set(scorer.labels):
        yield "passing", "give labels, and which of them are passing"


def _read_row(line: bytes, where: str) -> SuiteRow:
    if len(line) > _LONGEST_LINE:
        raise InvalidInputError(f"{where}: longer than {_LONGEST_LINE // 2**20} MiB")
    try:
        values = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as exc:
        raise InvalidInputError(f"{where}: no UTF-8") from exc
    except RecursionError as exc:
        raise InvalidInputError(f"{where}: nested too deeply") from exc
    except ValueError as exc:
        raise InvalidInputError(f"{where}: no valid JSON: {exc}") from exc
    if not isinstance(values, dict):
        raise InvalidInputError(f"{where}: no JSON object")
    if unknown := sorted(values.keys() - _FIELDS):
        raise InvalidInputError(
            f"{where}: there is no field {unknown[0]!r}: there are {', '.join(sorted(_FIELDS))}",
            param=unknown[0],
        )
    return _checked(values, where)


def _checked(values: Mapping[str, Any], where: str) -> SuiteRow:
    identity, gold, choices = values.get("id"), values.get("gold"), values.get("choices")
    if not isinstance(identity, str | int) or isinstance(identity, bool):
        raise InvalidInputError(f"{where}: `id` is missing", param="id")
    messages = _list_of(values, "messages", dict, where)
    if not messages or not all(isinstance(each.get("role"), str) for each in messages):
        raise InvalidInputError(f"{where}: `messages` is no list of messages", param="messages")
    calls = _list_of(values, "calls", dict, where)
    if gold is None and calls:
        gold = ""
    if not isinstance(gold, str):
        raise InvalidInputError(f"{where}: `gold` is no text", param="gold")
    if choices is not None and (
        not isinstance(choices, list)
        or not all(isinstance(each, str) for each in choices)
        or gold not in choices
    ):
        raise InvalidInputError(
            f"{where}: `choices` is no list of texts that `gold` is in", param="choices"
        )
    return SuiteRow(
        id=str(identity),
        messages=messages,
        gold=gold,
        choices=None if choices is None else tuple(choices),
        schema=_schema(values.get("schema"), where),
        tags=tuple(sorted(set(_list_of(values, "tags", str, where)))),
        tools=_list_of(values, "tools", dict, where),
        calls=calls,
    )


def _list_of(values: Mapping[str, Any], name: str, kind: type, where: str) -> tuple[Any, ...]:
    found = values.get(name) or []
    if not isinstance(found, list) or not all(isinstance(each, kind) for each in found):
        what = "texts" if kind is str else "objects"
        raise InvalidInputError(f"{where}: `{name}` is no list of {what}", param=name)
    return tuple(found)


def _schema(found: Any, where: str) -> str | None:
    if found is None:
        return None
    if isinstance(found, str):
        try:
            found = json.loads(found)
        except ValueError as exc:
            raise InvalidInputError(f"{where}: `schema` is no JSON: {exc}", param="schema") from exc
    if not isinstance(found, dict | bool):
        raise InvalidInputError(f"{where}: `schema` is no JSON schema", param="schema")
    return json.dumps(found, sort_keys=True, ensure_ascii=False)


def _plain(value: SuiteRow | Scorer) -> dict[str, Any]:
    """Without what is not set, so that a new field leaves the digests of older suites alone."""
    return {name: each for name, each in asdict(value).items() if each not in (None, (), "")} | (
        {"gold": value.gold} if isinstance(value, SuiteRow) else {}
    )


def _line(values: Mapping[str, Any]) -> bytes:
    text = json.dumps(values, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    # A lone surrogate can be written in JSON and in no file.
    return text.encode("utf-8", "backslashreplace") + b"\n"
