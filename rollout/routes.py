"""A route: the public name that an application asks for, and how its answers are compared."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from rollout.evaluation import EvaluationRules, evaluation_problems
from rollout.policy import Policy, Slo
from rollout.retraining import Retrain, retrain_problems

Comparator = Literal["text", "json", "tools", "judge"]


@dataclass(frozen=True, slots=True)
class JsonRules:
    """How JSON and the arguments of tools are compared.

    `tolerance` is the relative difference of two numbers that still counts as none. `unordered`
    and `ignored` are JSON pointers, in which `*` stands for any name or place: lists whose order
    does not matter, and values that are not compared.
    """

    tolerance: float = 1e-6
    unordered: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Semantic:
    """Nearness in meaning, by the embeddings that an engine gives, or a `local` model.

    `model` is the name that the engine knows (None: its base) or a version, as `route@3`. `local`
    is a directory on each shadow's machine, which a static model is read from. From the cosine similarity `agrees_from` on two texts agree; None: it only tells how far apart.
    """

    engine: str | None = None
    model: str | None = None
    agrees_from: float | None = None
    local: str | None = None


@dataclass(frozen=True, slots=True)
class Judge:
    """A model that says which of two answers is better, asked in both orders.

    `model` is the name that the engine knows (None: its base) or a version, as `route@3`.
    `prompt` is what it is told to look at. `sample` is the chance that a disagreement is judged.
    Only where `decides` is set its verdicts count as wins and losses; else they stand beside
    what people say. `maximum_tokens` bound each verdict, thoughts before it included, and
    `seconds` both questions together.
    """

    engine: str
    model: str | None = None
    prompt: str | None = None
    decides: bool = False
    sample: float = 1.0
    temperature: float | None = 0.0
    maximum_tokens: int = 64
    seconds: float = 30.0


@dataclass(frozen=True, slots=True)
class Route:
    """`schema` is the text of a JSON schema that answers should satisfy, or None.

    `capture` is the chance, in [0, 1], that an exchange is kept for the shadow while a version is
    on trial, `capture_idle` the chance that one is kept for a replay while none is. `retrain`
    None: only people start runs.
    """

    name: str
    engine: str
    comparator: Comparator = "text"
    schema: str | None = None
    slo: Slo = field(default_factory=Slo)
    capture: float = 0.1
    policy: Policy = field(default_factory=Policy)
    capture_idle: float = 0.0
    json_rules: JsonRules = field(default_factory=JsonRules)
    semantic: Semantic | None = None
    judge: Judge | None = None
    evaluation: EvaluationRules = field(default_factory=EvaluationRules)
    retrain: Retrain | None = None


def named_engines(route: Route) -> Iterator[tuple[str, str]]:
    """The engines that a route needs, each with the field that names it."""
    yield "engine", route.engine
    if route.semantic is not None and route.semantic.engine is not None:
        yield "semantic.engine", route.semantic.engine
    if route.judge is not None:
        yield "judge.engine", route.judge.engine


def route_problems(route: Route) -> Iterator[tuple[str, str]]:
    """Each field of the comparing that makes no sense, and what is wrong with it."""
    rules, semantic, judge = route.json_rules, route.semantic, route.judge
    if not 0 <= rules.tolerance < 1:
        yield "json_rules.tolerance", "tolerance is a share: it must lie in [0, 1)"
    for name, pointers in (("unordered", rules.unordered), ("ignored", rules.ignored)):
        for pointer in pointers:
            if pointer and not pointer.startswith("/"):
                yield f"json_rules.{name}", f"{pointer!r} is no JSON pointer: write /{pointer}"
    if semantic is not None and (semantic.engine is None) == (semantic.local is None):
        yield "semantic.engine", "say either an engine or the directory of a local model"
    least = None if semantic is None else semantic.agrees_from
    if least is not None and not 0 < least <= 1:
        yield "semantic.agrees_from", "agrees_from is a similarity: it must lie in (0, 1]"
    if judge is not None and not 0 <= judge.sample <= 1:
        yield "judge.sample", "sample is a chance: it must lie in [0, 1]"
    if judge is not None and judge.seconds <= 0:
        yield "judge.seconds", "seconds must be more than 0"
    if judge is not None and judge.maximum_tokens < 1:
        yield "judge.maximum_tokens", "maximum_tokens must be 1 or more"
    for name, problem in evaluation_problems(route.evaluation):
        yield f"evaluation.{name}", problem
    for name, problem in retrain_problems(route.retrain) if route.retrain else ():
        yield f"retrain.{name}", problem
    if route.comparator == "judge" and judge is None:
        yield "judge", 'the comparator is judge: say which, as in judge = {engine = "main"}'
