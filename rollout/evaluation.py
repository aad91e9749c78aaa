"""What a route asks of an evaluation before a version may be proposed."""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EvaluationRules:
    """`[routes.evaluation]`.

    alpha: chance that a version which is no better is called better or worse, by one look.
    margin: how far below its parent's a guarded slice's score may lie.
    guarded: the slices (tags of a suite's rows) that must not be worse; "*" is all of them.
    latency_ratio: the p50 of a version's answers, at most so many times its parent's; None is no
        limit. With a limit the parent is asked anew each time, for kept answers have old times.
    p99_seconds: the p99 of its answers, at most so long.
    cost_ratio: what a right answer costs, at most so many times what its parent's costs.
    maximum_looks: versions that may be judged by one suite before a report says that it is worn.
    prompt: look for the best prompt with examples, and evaluate the base under it.
    prompt_rows: rows of the dataset's own, never of the suite, that choose that prompt.
    larger: a route whose stable version is evaluated beside the others.
    """

    alpha: float = 0.05
    margin: float = 0.05
    guarded: tuple[str, ...] = ()
    latency_ratio: float | None = None
    p99_seconds: float | None = None
    cost_ratio: float | None = None
    maximum_looks: int = 12
    prompt: bool = True
    prompt_rows: int = 40
    larger: str | None = None


def evaluation_problems(rules: EvaluationRules) -> Iterator[tuple[str, str]]:
    """Each field that makes no sense, and what is wrong with it."""
    for name in ("alpha", "margin"):
        if not 0 < getattr(rules, name) < 0.5:
            yield name, f"{name} is {getattr(rules, name):g}: it must lie between 0 and 0.5"
    for name in ("latency_ratio", "p99_seconds", "cost_ratio"):
        limit = getattr(rules, name)
        if limit is not None and limit <= 0:
            yield name, f"{name} must be more than 0"
    for name in ("maximum_looks", "prompt_rows"):
        if getattr(rules, name) < 1:
            yield name, f"{name} must be 1 or more"
