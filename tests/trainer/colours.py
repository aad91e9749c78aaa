"""Questions of a kind that a small server can answer: what is red is warm, what is blue cold."""

from rollout.datasets import Dataset, Example, from_rows
from rollout.suites import SuiteRow
from tests.trainer.answering import Body, Reply, last_question
from tests.trainer.samples import ROUTE

COLOURS = {"red": "warm", "blue": "cold", "green": "mild"}
CHOICES = tuple(sorted(COLOURS.values()))


def rows(count: int, start: int = 0) -> list[SuiteRow]:
    return [row(number) for number in range(start, start + count)]


def row(number: int) -> SuiteRow:
    colour = list(COLOURS)[number % 3]
    asked = ({"role": "user", "content": f"thing {number} is {colour}"},)
    tags = ("even" if number % 2 == 0 else "odd",)
    return SuiteRow(f"{number:04d}", asked, COLOURS[colour], CHOICES, tags=tags)


def dataset(count: int, start: int = 1000) -> Dataset:
    """Rows that no suite has, a tenth of them for validation."""
    return from_rows(
        Example(
            case=row.id,
            messages=row.messages,
            gold=row.gold,
            labeler="ada",
            choice="first",
            inclusion=1.0,
            cluster=row.id,
            split="validation" if number % 10 == 0 else "train",
        )
        for number, row in enumerate(rows(count, start))
    )


def right(body: Body) -> str:
    return COLOURS[last_question(body).rpartition(" ")[2]]


def by_version(body: Body) -> Reply:
    """The second version is always right, the first only of red and where examples show it how."""
    if body["model"] != f"{ROUTE}@1":
        return right(body)
    shown = len(body["messages"]) > 4
    return right(body) if shown or "red" in last_question(body) else "warm"
