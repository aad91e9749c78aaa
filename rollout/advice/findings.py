"""The questions that a good colleague would ask before a training, and what the answers come to."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final, Literal

from rollout.advice.known import Failure, Gathered, classes_of, failures_of, task_of
from rollout.cases import gold_text, prompt_digest

Mark = Literal["good", "bad", "unknown"]
# "first": something else is to be done before; "no": training would change nothing that matters.
AdviceVerdict = Literal["train", "not yet", "first", "no"]

_FEWEST_SAMPLES: Final = 20
_FEWEST_FAILURES: Final = 10
_EXAMPLES: Final = 3
# A task that makes up less of the traffic has company that a single adapter would have to serve.
_REPEATED: Final = 0.8
_SCATTERED: Final = 0.5
_SETTLED: Final = timedelta(days=7)
# From here on people find too little wrong for a training to show.
_NOTHING_TO_GAIN: Final = 0.97
_MOSTLY: Final = 0.5
# A model is hard to teach facts by examples of them, so fewer of these are already too many.
_MANY_FACTS: Final = 0.4
# Krippendorff's own limits: below the first nothing should be concluded.
_ALPHA_TOLERABLE, _ALPHA_GOOD = 0.667, 0.8
# Below the first a run is noise, from the second on more rows mostly refine; for each class.
_FEW_ROWS, _ENOUGH_ROWS, _ROWS_OF_A_CLASS = 50, 200, 10
_FEWEST_EVALUATION_ROWS: Final = 50


@dataclass(frozen=True, slots=True)
class Finding:
    """One question and its answer. `numbers` are what it rests on, `cases` what can be looked at."""

    question: str
    mark: Mark
    says: str
    numbers: Mapping[str, float] = field(default_factory=dict)
    cases: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Advice:
    route: str
    verdict: AdviceVerdict
    headline: str
    findings: tuple[Finding, ...]


Findings = Mapping[str, Finding]


def advise(known: Gathered, valid: Callable[[str], bool] | None, now: datetime) -> Advice:
    """`valid` tells whether a text satisfies the route's schema; None where it has none."""
    failures = failures_of(known.labelled, valid)
    findings = {
        "possible": _possible(known),
        "gain": _gain(known, failures),
        "repeated": _repeated(known),
        "settled": _settled(known, now),
        "form": _form(known, failures),
        "knowledge": _knowledge(failures),
        "labelers": _labelers(known),
        "data": _data(known),
        "evaluation": _evaluation(known),
        "back": _way_back(known),
        "saves": _saves(known),
    }
    verdict, headline = _verdict(known, findings)
    return Advice(known.route, verdict, headline, tuple(findings.values()))


def _possible(known: Gathered) -> Finding:
    question = "Can an adapter be served?"
    if known.adapters:
        return Finding(question, "good", f"the engine loads adapters for {known.base}")
    return Finding(
        question,
        "bad",
        "the engine of this route loads no adapters: put the route on one of kind vllm first",
    )


def _gain(known: Gathered, failures: Sequence[Failure]) -> Finding:
    question = "Is there something to gain?"
    if known.accord is None:
        wrong = len(failures)
        return Finding(
            question,
            "unknown",
            f"people corrected {wrong} of {len(known.labelled)} labelled cases; how often stable is "
            "right among all requests shows once 30 cases of its own are decided",
            {"wrong": wrong, "labelled": len(known.labelled)},
        )
    numbers = {"right": known.accord.rate, "low": known.accord.low, "high": known.accord.high}
    says = f"people find {known.stable} right in {known.accord} of the pairs"
    if known.accord.low >= _NOTHING_TO_GAIN:
        return Finding(question, "bad", f"{says}: there is hardly anything left to learn", numbers)
    return Finding(question, "good", says, numbers)


def _repeated(known: Gathered) -> Finding:
    question = "Is it one task, again and again?"
    count = len(known.samples)
    whence = "captured requests" if known.captured else "cases (nothing else is captured)"
    if count < _FEWEST_SAMPLES:
        return Finding(
            question,
            "unknown",
            f"{count} {whence}, and {_FEWEST_SAMPLES} are needed: raise `capture` or `capture_idle`",
            {"requests": count},
        )
    shares = Counter(task_of(sample) for sample in known.samples)
    most = shares.most_common(1)[0][1]
    share = most / count
    numbers = {"share": share, "requests": count, "tasks": len(shares)}
    says = f"{share:.0%} of {count} {whence} come under one instruction" + (
        f", the rest under {len(shares) - 1} others" if most < count else ""
    )
    if share >= _REPEATED:
        return Finding(question, "good", says, numbers)
    if share >= _SCATTERED:
        return Finding(question, "unknown", f"{says}: what is learnt serves that part", numbers)
    return Finding(
        question,
        "bad",
        f"{says}: give each task a route of its own, and train the largest",
        numbers,
    )


def _settled(known: Gathered, now: datetime) -> Finding:
    """Since when the commonest instruction of the newest requests is the one in use."""
    question = "Has the instruction stopped changing?"
    if len(known.samples) < _FEWEST_SAMPLES:
        return Finding(question, "unknown", f"{len(known.samples)} requests are too few to tell")
    ordered = sorted(known.samples, key=lambda sample: sample.at)
    newest = ordered[-max(_FEWEST_SAMPLES // 2, len(ordered) // 4) :]
    present = Counter(map(task_of, newest)).most_common(1)[0][0]
    first = next(sample.at for sample in ordered if task_of(sample) == present)
    days = (now - first) / timedelta(days=1)
    before = sum(task_of(sample) != present for sample in ordered if sample.at < first)
    numbers = {"days": days, "before": before}
    if not before and now - first >= _SETTLED:
        says = f"it has been the same as far back as is known, {days:.0f} days"
        return Finding(question, "good", says, numbers)
    if not before:
        return Finding(
            question, "unknown", f"it is the same as far back as is known, {days:.1f} days", numbers
        )
    says = f"the present one came {days:.1f} days ago, after {before} requests under others"
    if now - first >= _SETTLED:
        return Finding(question, "good", says, numbers)
    return Finding(
        question,
        "bad",
        f"{says}: an adapter learns the instruction that it was trained under; let it stand for "
        f"{_SETTLED.days} days",
        numbers,
    )


def _form(known: Gathered, failures: Sequence[Failure]) -> Finding:
    question = "Would constraining the form be enough?"
    checked = [sample for sample in known.samples if sample.valid is not None]
    broken = sum(not sample.valid for sample in checked)
    constrained = sum(sample.constrained for sample in known.samples)
    wrong = [failure for failure in failures if failure.kind == "form"]
    share = len(wrong) / len(failures) if failures else 0.0
    numbers = {
        "form": len(wrong),
        "failures": len(failures),
        "broken_schema": broken,
        "checked": len(checked),
        "constrained": constrained,
    }
    says = (
        f"{len(wrong)} of {len(failures)} wrong answers are wrong in form alone (they break the "
        "schema, are none of the known answers, or say the same in other dress)"
        + (f"; {broken} of {len(checked)} captured answers break the schema" if checked else "")
    )
    cases = _some(wrong)
    if len(failures) < _FEWEST_FAILURES:
        return Finding(question, "unknown", f"{says}: too few to tell", numbers, cases)
    if share < _MOSTLY:
        return Finding(question, "good", f"no: {says}", numbers, cases)
    if known.samples and constrained >= _MOSTLY * len(known.samples):
        says = f"{says}, though most requests ask for a form already"
        return Finding(question, "unknown", says, numbers, cases)
    return Finding(
        question,
        "bad",
        f"yes: {says}. Let clients send `response_format` with the schema, or `structured_outputs` "
        "with the choices; it costs no training",
        numbers,
        cases,
    )


def _knowledge(failures: Sequence[Failure]) -> Finding:
    question = "Is it behaviour that is wrong, or knowledge that is missing?"
    kinds = Counter(failure.kind for failure in failures)
    numbers = {kind: float(kinds[kind]) for kind in ("choice", "wording", "form", "facts")}
    says = (
        f"of {len(failures)} wrong answers {kinds['choice']} chose another answer, "
        f"{kinds['wording']} should have been put otherwise, {kinds['form']} were wrong in form, and "
        f"{kinds['facts']} lack numbers, names or addresses that the prompt does not have"
    )
    if len(failures) < _FEWEST_FAILURES:
        return Finding(question, "unknown", f"{says}: too few to tell", numbers)
    facts = [failure for failure in failures if failure.kind == "facts"]
    if len(facts) >= _MANY_FACTS * len(failures):
        return Finding(
            question,
            "bad",
            f"{says}: put what it has to know into the prompt (retrieval); examples teach how to "
            "answer, hardly what is true",
            numbers,
            _some(facts),
        )
    return Finding(question, "good", f"behaviour: {says}", numbers, _some(facts))


def _labelers(known: Gathered) -> Finding:
    question = "Do the people who label agree?"
    alpha, cases = known.agreement.alpha, known.agreement.cases
    if alpha is None or cases < _FEWEST_SAMPLES:
        return Finding(
            question,
            "unknown",
            f"{cases} cases have labels of several people: set `labels_per_case` to 2 for a while",
            {"cases": cases},
        )
    numbers = {"alpha": alpha, "cases": cases}
    says = f"Krippendorff's alpha is {alpha:.2f} on {cases} cases"
    if alpha >= _ALPHA_GOOD:
        return Finding(question, "good", says, numbers)
    if alpha >= _ALPHA_TOLERABLE:
        return Finding(question, "good", f"{says}, which is tolerable", numbers)
    return Finding(
        question,
        "bad",
        f"{says}, below {_ALPHA_TOLERABLE:g}: write down what is right, with the cases on which they "
        "differ (`sluice cases list --state disputed`), before a model learns both",
        numbers,
    )


def _data(known: Gathered) -> Finding:
    question = "Is there enough data?"
    rows = len(
        {prompt_digest(row.case.messages) for row in known.labelled if gold_text(row) is not None}
    )
    classes = classes_of(known.labelled)
    lacking = sorted(name for name, count in classes.items() if count < _ROWS_OF_A_CLASS)
    numbers = {"rows": rows, "classes": len(classes), "classes_lacking": len(lacking)}
    says = f"{rows} different prompts have a right answer"
    if classes:
        least, most = min(classes.values()), max(classes.values())
        says += f", in {len(classes)} classes of {least} to {most}"
    if lacking:
        named = ", ".join(lacking[:5]) + (" and others" if len(lacking) > 5 else "")
        says += f"; fewer than {_ROWS_OF_A_CLASS} of {named}"
    waiting = f"; {known.open_cases} cases wait for a label" if known.open_cases else ""
    if rows < _FEW_ROWS:
        return Finding(
            question, "bad", f"{says}: {_FEW_ROWS} is the least to try with{waiting}", numbers
        )
    if rows < _ENOUGH_ROWS:
        return Finding(
            question,
            "unknown",
            f"{says}: enough to try; by experience each doubling still helps below "
            f"{_ENOUGH_ROWS}{waiting}",
            numbers,
        )
    return Finding(question, "unknown" if lacking else "good", f"{says}{waiting}", numbers)


def _evaluation(known: Gathered) -> Finding:
    question = "Will one see whether it got better?"
    own = known.suite_rows is not None
    what = "the route's suite has" if own else "there is no suite; the held-out part would have"
    numbers = {"rows": float(known.evaluation_rows)}
    says = f"{what} {known.evaluation_rows} rows"
    if known.detectable is not None:
        numbers["detectable"] = known.detectable
        says += f", which show a gain of {known.detectable:.0%} and more"
    if known.evaluation_rows >= _FEWEST_EVALUATION_ROWS:
        return Finding(question, "good", says, numbers)
    return Finding(question, "bad", f"{says}: make it {_FEWEST_EVALUATION_ROWS} at least", numbers)


def _way_back(known: Gathered) -> Finding:
    says = f"{known.stable} stays pinned; a trial is rolled back by itself or with one command"
    if known.previous is not None:
        says += f", and behind it there is {known.previous}"
    return Finding("Is there a way back?", "good", says, {"versions": known.versions})


def _saves(known: Gathered) -> Finding:
    question = "What would it save?"
    counted = [each for each in known.samples if each.prompt_tokens and each.characters]
    bases = (
        f"; a tuned {', '.join(known.other_bases)} might do as well" if known.other_bases else ""
    )
    if not counted:
        says = "how long prompts are is not known without captures"
        return Finding(question, "unknown", f"{says}{bases}")
    prompt = sum(each.prompt_tokens for each in counted) / len(counted)
    dropped = sum(
        each.prompt_tokens * len(each.instruction) / each.characters for each in counted
    ) / len(counted)
    numbers = {"prompt_tokens": prompt, "instruction_tokens": dropped}
    if dropped < 1:
        says = f"prompts have {prompt:.0f} tokens on average and no instruction that could go"
        return Finding(question, "unknown", f"{says}{bases}", numbers)
    says = (
        f"about {dropped:.0f} of {prompt:.0f} tokens of a prompt are the instruction "
        f"({dropped / prompt:.0%}), which a tuned version may do without"
    )
    return Finding(question, "good", f"{says}{bases}", numbers)


# What stands in the way, in the order in which one would clear it, and what to call it.
_OBSTACLES: Final[Sequence[tuple[str, AdviceVerdict, str]]] = (
    ("possible", "no", "Training is not possible here"),
    ("gain", "no", "Don't train: there is hardly anything to gain"),
    ("form", "first", "Constrain the form first"),
    ("knowledge", "first", "Give it what it has to know first"),
    ("labelers", "first", "Let the people agree first"),
    ("settled", "first", "Let the instruction settle first"),
    ("repeated", "first", "Split the route by task first"),
    ("data", "not yet", "Not yet: label more"),
    ("evaluation", "not yet", "Not yet: there is too little to evaluate on"),
)


def _verdict(known: Gathered, findings: Findings) -> tuple[AdviceVerdict, str]:
    last = f" The last report said: {known.last_report}" if known.last_report else ""
    for name, verdict, headline in _OBSTACLES:
        if findings[name].mark == "bad":
            return verdict, f"{headline}: {findings[name].says}.{last}"
    unknown = [finding.question for finding in findings.values() if finding.mark == "unknown"]
    open_questions = f" Open is still: {' '.join(unknown)}" if unknown else ""
    return "train", f"Train: nothing that is known speaks against it.{open_questions}{last}"


def _some(failures: Sequence[Failure]) -> tuple[str, ...]:
    return tuple(failure.case for failure in failures[:_EXAMPLES])
