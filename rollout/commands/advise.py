"""`sluice advise`: whether a route should be trained, with reasons."""

from rich.console import Group, RenderableType
from rich.text import Text

from rollout.advice import Advice, AdviceVerdict, Finding, Mark
from rollout.commands.session import Session, Subparsers, command, table

_MARKS: dict[Mark, tuple[str, str]] = {
    "good": ("+", "green"),
    "bad": ("-", "red"),
    "unknown": ("?", "yellow"),
}
_COLOURS: dict[AdviceVerdict, str] = {
    "train": "green",
    "first": "yellow",
    "not yet": "yellow",
    "no": "red",
}


def add(parsers: Subparsers) -> None:
    parser = command(
        parsers, "advise", _advise, "say whether a route should be trained", reads=True
    )
    parser.add_argument("route")


def _advise(session: Session) -> int:
    advice = session.client.advice(session.options.route)
    if session.wants_json:
        session.show(Advice, advice, table)
        return 0
    session.out.print(_describe(advice))
    return 0


def _describe(advice: Advice) -> RenderableType:
    lines: list[RenderableType] = [
        Text(advice.headline, style=f"bold {_COLOURS[advice.verdict]}"),
        Text(),
    ]
    for finding in advice.findings:
        lines += _reason(finding)
    return Group(*lines)


def _reason(finding: Finding) -> list[RenderableType]:
    mark, colour = _MARKS[finding.mark]
    looked = f" (look at {', '.join(finding.cases)})" if finding.cases else ""
    return [
        Text(f"{mark} ", colour).append(finding.question, "bold"),
        Text(f"  {finding.says}{looked}"),
    ]
