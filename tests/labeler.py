"""A labeler who knows the right answer."""

from rollout.cases import Case, Choice, same_text


def choice_for(case: Case, gold: str) -> Choice:
    """The choice of one who knows that `gold` is right."""
    first, second = (answer.ok and same_text(answer.text, gold) for answer in case.answers)
    if first and second:
        return "both"
    if first:
        return "first"
    return "second" if second else "neither"
