"""Takes what points to a person out of text and JSON before any of it is stored.

Each find gives way to a placeholder that names its kind, as `[email]`. JSON stays JSON of the same
shape: only string values change, never keys, numbers or the bytes in between. What was redacted
once is not changed by a second time.
"""

import json
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, TypeVar

import msgspec
import phonenumbers
import regex
from pydantic import Field, field_validator

from rollout.exchanges import Answer, Exchange
from rollout.settings import Section

T = TypeVar("T")
Span = tuple[int, int]

BUILT_IN: Final = ("email", "card", "phone")
# A name becomes `[name]`, and these would be JSON.
_NO_NAMES: Final = frozenset({*BUILT_IN, "true", "false", "null"})
_NAME: Final = re.compile(r"[a-z][a-z0-9_-]{0,31}")

# Of an address the `@` is found first, so that no text makes the search slow.
_LOCAL: Final = frozenset(".!#$%&'*+/?^_`{|}~-")
_LONGEST_LOCAL: Final = 64
_DOMAIN: Final = re.compile(
    r"(?:[^\W_](?:[\w-]{0,61}[^\W_])?\.){1,8}(?:xn--[a-z0-9-]{2,59}|[^\W\d_]{2,24})(?![\w-])",
    re.IGNORECASE,
)
# As people write them: in groups of any length, parted by a space, a dot or a dash.
_CARD_RUN: Final = re.compile(r"\d(?:[ .\-\u00a0\u2010-\u2015]?\d){12,}")
_CARD_LENGTHS: Final = range(19, 12, -1)
# The first digits of the payment networks; nine of ten other long numbers fall out here.
_CARD_STARTS: Final = frozenset("23456")

# No shorter run of digits is a telephone number; the matcher itself is slow.
_PHONE_RUN: Final = re.compile(r"\d(?:[^\w\n]{0,4}\d){6,}")
_FEWEST_DIGITS: Final = 7
_DIGITS: Final = b"0123456789"
_BEFORE_PHONE: Final = 8
_AFTER_PHONE: Final = 16
_PIECE: Final = 256
_OVERLAP: Final = 48

_JSON_STRING: Final = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"(\s*:)?', re.DOTALL)
# A picture in a message; digits in it are not for people.
_DATA_URL: Final = re.compile(r"data:[\w/.+;=-]{1,128};base64,[A-Za-z0-9+/=_-]*")
_NOTHING: Final[Mapping[str, int]] = {}
# Looks at the grammar alone: no number is too large for it.
_raw: Final = msgspec.json.Decoder(msgspec.Raw)
# JSON in a string in JSON, as the arguments of a tool call are.
_DEEPEST: Final = 6


class RedactionSection(Section):
    """What is taken out of exchanges and feedback before they are stored.

    phone_regions: countries whose numbers are also found without `+` and country code.
    patterns: regular expressions of the operator's, by the name of their kind.
    maximum_seconds: for one exchange; one that takes longer is not stored.
    """

    emails: bool = True
    phones: bool = True
    cards: bool = True
    phone_regions: tuple[str, ...] = ("US",)
    patterns: Mapping[str, str] = Field(default_factory=dict)
    maximum_seconds: float = Field(1.0, gt=0)

    @field_validator("phone_regions")
    @classmethod
    def _regions(cls, regions: tuple[str, ...]) -> tuple[str, ...]:
        for region in regions:
            if region not in phonenumbers.SUPPORTED_REGIONS:
                raise ValueError(f"{region!r} is no country in two capitals, such as US or GB")
        return regions

    @field_validator("patterns")
    @classmethod
    def _patterns(cls, patterns: Mapping[str, str]) -> Mapping[str, str]:
        for name, text in patterns.items():
            compile_pattern(name, text)
        return patterns


class RedactionTimeoutError(Exception):
    """It took longer than it may; what was to be redacted must not be stored."""


@dataclass(frozen=True, slots=True)
class Redacted:
    """An exchange that may be stored, and how often each kind was found in it."""

    exchange: Exchange
    counts: Mapping[str, int]


class Redactor:
    """Looks for the kinds that are on. Each call takes at most about `maximum_seconds`.

    `phone_regions` are countries whose numbers are also found without `+` and country code.
    `patterns` are the operator's own, by the name of their kind; they are tried first.
    """

    def __init__(
        self,
        *,
        emails: bool = True,
        phones: bool = True,
        cards: bool = True,
        phone_regions: Sequence[str] = ("US",),
        patterns: Mapping[str, str] | None = None,
        maximum_seconds: float = 1.0,
    ) -> None:
        own = {name: compile_pattern(name, text) for name, text in (patterns or {}).items()}
        self._rules: list[_Rule] = [_Rule(name, _matches_of(each)) for name, each in own.items()]
        self._has_patterns = bool(own)
        if emails:
            self._rules.append(_Rule("email", _emails))
        if cards:
            self._rules.append(_Rule("card", _cards))
        if phones:
            self._rules.append(_Rule("phone", _phones_of(phone_regions)))
        self._maximum = maximum_seconds
        names = "|".join(re.escape(name) for name in (*BUILT_IN, *own))
        self._placeholder = re.compile(rf"(\[(?:{names})\])")

    @property
    def costly(self) -> bool:
        """Whether even a short text may take long."""
        return self._has_patterns

    def text(self, text: str) -> str:
        """A text, or JSON in a string. Raises RedactionTimeoutError."""
        return self._run().string(text)

    def json(self, text: str) -> str:
        """JSON of any kind, as it was written but for its string values."""
        return self._run().document(text)

    def answer(self, answer: Answer) -> Answer:
        return self._run().answer(answer)

    def exchange(self, exchange: Exchange) -> Redacted:
        run = self._run()
        request, answer = run.document(exchange.request), run.answer(exchange.answer)
        # Most hold nothing, and copying costs more than looking.
        if request == exchange.request and answer is exchange.answer:
            return Redacted(exchange, _NOTHING)
        return Redacted(replace(exchange, request=request, answer=answer), dict(run.counts))

    def value(self, value: T) -> tuple[T, Mapping[str, int]] | None:
        """A decoded JSON value and how often each kind was found in it; None: it took too long."""
        run = self._run()
        try:
            return run.value(value), dict(run.counts)
        except RedactionTimeoutError:
            return None

    def _run(self) -> "_Run":
        return _Run(self._rules, self._placeholder, self._has_patterns, _Clock(self._maximum))


def compile_pattern(name: str, text: str) -> "regex.Pattern[str]":
    """A pattern of the operator's. Raises ValueError with its name and what is wrong with it."""
    if not _NAME.fullmatch(name) or name in _NO_NAMES:
        raise ValueError(
            f"{name!r} can't name a pattern: take up to 32 of a-z, 0-9, _ and -, a letter first, "
            f"and none of {', '.join(sorted(_NO_NAMES))}"
        )
    try:
        return regex.compile(text)
    except regex.error as exc:
        raise ValueError(f"the pattern {name!r} is no regular expression: {exc}") from exc


class _Clock:
    """Counts down the time that a call may take."""

    __slots__ = ("_end",)

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        seconds = self._end - time.monotonic()
        if seconds <= 0:
            raise RedactionTimeoutError("redaction took too long")
        return seconds


Find = Callable[[str, _Clock], Iterable[Span]]


@dataclass(frozen=True, slots=True)
class _Rule:
    """`find` gives spans of a text in their order, none of them empty."""

    kind: str
    find: Find


class _Run:
    """One call: its rules, its clock, and what it has found."""

    def __init__(
        self, rules: Sequence[_Rule], placeholder: re.Pattern[str], look: bool, clock: _Clock
    ) -> None:
        self._rules = rules
        self._placeholder = placeholder
        self._always_look = look
        self._clock = clock
        self.counts: defaultdict[str, int] = defaultdict(int)

    def answer(self, answer: Answer) -> Answer:
        """The very same answer where there is nothing in it."""
        text = self.string(answer.text)
        if text == answer.text and not answer.tool_calls and answer.error is None:
            return answer
        return replace(
            answer,
            text=text,
            tool_calls=tuple(self.value(call) for call in answer.tool_calls),
            error=None if answer.error is None else self.string(answer.error),
        )

    def document(self, text: str, depth: int = 0) -> str:
        if self._is_clean(text):
            return text
        if not _is_json(text):
            return self.string(text, _DEEPEST)

        def replaced(token: re.Match[str]) -> str:
            if token[1] is not None:  # the name of a member
                return token[0]
            plain = "\\" not in token[0]
            value: str = token[0][1:-1] if plain else json.loads(token[0], strict=False)
            done = self.string(value, depth)
            return token[0] if done == value else _quoted(done)

        return _JSON_STRING.sub(replaced, text)

    def _is_clean(self, text: str) -> bool:
        """Whether no string in it can hold anything, for nothing is written with escapes."""
        return not (self._always_look or "\\" in text or "@" in text or _has_long_run(text))

    def string(self, text: str, depth: int = 0) -> str:
        """Redact until nothing is found any more: what stands beside a placeholder may be new."""
        while True:
            # JSON may say anything with escapes.
            inner = depth < _DEEPEST and text.lstrip()[:1] in ("{", "[")
            look = self._always_look or "@" in text or (inner and "\\u" in text)
            if not (look or _has_long_run(text)) or _DATA_URL.fullmatch(text):
                return text
            self._clock.left()
            nested = inner and _is_json(text)
            done = self.document(text, depth + 1) if nested else self._once(text)
            if done == text:
                return text
            text = done

    def value(self, value: T) -> T:
        """A decoded JSON value with its strings redacted."""
        done: Any = value
        if isinstance(value, str):
            done = self.string(value)
        elif isinstance(value, Mapping):
            done = {name: self.value(each) for name, each in value.items()}
        elif isinstance(value, list | tuple):
            done = [self.value(each) for each in value]
        return done  # type: ignore[no-any-return]

    def _once(self, text: str) -> str:
        # Placeholders stand at the odd places, and are never looked into.
        parts = self._placeholder.split(text)
        for rule in self._rules:
            found: list[str] = []
            for place, part in enumerate(parts):
                if place % 2:
                    found.append(part)
                else:
                    found += self._parted(part, rule)
            parts = found
        return "".join(parts)

    def _parted(self, text: str, rule: _Rule) -> Iterator[str]:
        """Text and placeholders by turns; text comes first and last."""
        position = 0
        for start, end in rule.find(text, self._clock):
            yield text[position:start]
            yield f"[{rule.kind}]"
            self.counts[rule.kind] += 1
            position = end
        yield text[position:]


def _matches_of(pattern: "regex.Pattern[str]") -> Find:
    def find(text: str, clock: _Clock) -> list[Span]:
        try:
            # It lets other threads go on meanwhile, and gives up by itself.
            found = pattern.finditer(text, timeout=clock.left(), concurrent=True)
            return [match.span() for match in found if match.end() > match.start()]
        except TimeoutError as exc:
            raise RedactionTimeoutError("a pattern for redaction took too long") from exc

    return find


def _emails(text: str, clock: _Clock) -> Iterator[Span]:
    at, done = text.find("@"), 0
    while at >= 0:
        clock.left()
        domain = _DOMAIN.match(text, at + 1)
        start = _local_start(text, at, max(done, at - _LONGEST_LOCAL)) if domain else at
        if domain and start < at:
            done = domain.end()
            yield start, done
        at = text.find("@", max(at + 1, done))


def _local_start(text: str, at: int, earliest: int) -> int:
    """Where the name before the `@` begins; it begins with a letter or a digit."""
    start = at
    while start > earliest and (text[start - 1].isalnum() or text[start - 1] in _LOCAL):
        start -= 1
    while start < at and not text[start].isalnum():
        start += 1
    return start


def _cards(text: str, clock: _Clock) -> Iterator[Span]:
    for run in _CARD_RUN.finditer(text):
        places = [place for place in range(run.start(), run.end()) if text[place].isdecimal()]
        digits = [int(text[place]) for place in places]
        first = 0
        while first < len(places):
            clock.left()
            length = _card_length(text, places, digits, first)
            if length:
                yield places[first], places[first + length - 1] + 1
            first += length or 1


def _card_length(text: str, places: Sequence[int], digits: Sequence[int], first: int) -> int:
    """How many digits from `first` on are a card's number; 0 where none are."""
    begin = places[first]
    if str(digits[first]) not in _CARD_STARTS or (begin and text[begin - 1].isdecimal()):
        return 0
    for length in _CARD_LENGTHS:
        if first + length > len(places):
            continue
        end = places[first + length - 1] + 1
        if not text[end : end + 1].isdecimal() and _luhn(digits[first : first + length]):
            return length
    return 0


def _luhn(digits: Sequence[int]) -> bool:
    """Whether the last digit is the check digit of ISO/IEC 7812-1."""
    doubled = (2 * digit - 9 * (digit > 4) for digit in digits[-2::-2])
    return (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


def _phones_of(regions: Sequence[str]) -> Find:
    # Without a region numbers with `+` are found.
    each: Sequence[str | None] = [*regions] or [None]

    def find(text: str, clock: _Clock) -> Iterator[Span]:
        found: list[Span] = []
        for start, end in _pieces(text):
            clock.left()
            for region in each:
                matcher = phonenumbers.PhoneNumberMatcher(text[start:end], region)
                found += [(start + match.start, start + match.end) for match in matcher]
        return _merged(found)

    return find


def _pieces(text: str) -> Iterator[Span]:
    """Where telephone numbers may be; a long stretch in pieces that overlap by more than one."""
    for run in _PHONE_RUN.finditer(text):
        end = min(len(text), run.end() + _AFTER_PHONE)
        start = max(0, run.start() - _BEFORE_PHONE)
        while end - start > _PIECE:
            yield start, start + _PIECE
            start += _PIECE - _OVERLAP
        yield start, end


def _merged(spans: Iterable[Span]) -> Iterator[Span]:
    last: Span | None = None
    for start, end in sorted(spans):
        if last is None or start >= last[1]:
            if last is not None:
                yield last
            last = (start, end)
        else:
            last = (last[0], max(last[1], end))
    if last is not None:
        yield last


def _has_long_run(text: str) -> bool:
    """Whether there are digits enough beside each other for a telephone number, or a card's."""
    if text.isascii():
        # Counting is many times as fast as looking for a run, and most texts have hardly any.
        plain = text.encode()
        if len(plain) - len(plain.translate(None, _DIGITS)) < _FEWEST_DIGITS:
            return False
    return _PHONE_RUN.search(text) is not None


def _is_json(text: str) -> bool:
    try:
        _raw.decode(text)
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError):
        # The other reader allows half a pair of surrogates.
        try:
            json.loads(text, parse_int=str, parse_float=str, parse_constant=_no_constant)
        except (ValueError, RecursionError):
            return False
    return True


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is no JSON")


def _quoted(text: str) -> str:
    quoted = json.dumps(text, ensure_ascii=False)
    try:
        quoted.encode()
    except UnicodeEncodeError:  # half of a pair of surrogates, which only an escape can say
        return json.dumps(text)
    return quoted
