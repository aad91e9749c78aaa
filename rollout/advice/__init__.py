"""Whether a route should be trained at all, as a good colleague would say: a verdict, with reasons.

Every finding rests on numbers that are named with it, and on cases that can be looked at. Nothing
here is a proof; what decides is the evaluation of what was trained.
"""

from rollout.advice.findings import Advice, AdviceVerdict, Finding, Mark, advise
from rollout.advice.known import (
    Failure,
    FailureKind,
    Gathered,
    Sample,
    classes_of,
    failures_of,
    sample_from,
    sample_of,
)

__all__ = [
    "Advice",
    "AdviceVerdict",
    "Failure",
    "FailureKind",
    "Finding",
    "Gathered",
    "Mark",
    "Sample",
    "advise",
    "classes_of",
    "failures_of",
    "sample_from",
    "sample_of",
]
