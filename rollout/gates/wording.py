"""The words of verdicts: numbers as people read them, and a verdict in one line."""

from rollout.evidence import Verdict


def in_short(verdict: Verdict) -> str:
    """What the gate measures, between which bounds, what it has to be; units; what is to come.

    The reason, where nothing was measured yet.
    """
    if verdict.units == 0 and verdict.threshold > 0.0 and verdict.value <= 1.0:
        return verdict.reason
    more = "" if verdict.needed is None else f", about {verdict.needed:,} more needed"
    return f"{_measured(verdict)}; {verdict.units:,} {verdict.counted}{more}"


def _measured(verdict: Verdict) -> str:
    low, high, limit = verdict.low, verdict.high, verdict.limit
    if verdict.estimate is None or low is None or high is None or limit is None:
        return f"e-value {number(verdict.value)} of {number(verdict.threshold)}"
    if verdict.gate == "pairs":
        return (
            f"wins {percent(verdict.estimate)} ({percent(low)} to {percent(high)}); passes "
            f"above {percent(limit)}, fails below 50 %"
        )
    return (
        f"{100 * verdict.estimate:+.3g} points ({100 * low:+.3g} to {100 * high:+.3g}); passes "
        f"below {100 * limit:+.3g}, fails above 0"
    )


def forecast(needed: int | None, counted: str) -> str:
    if needed is None:
        return "at the present rate it does not get there"
    return f"about {needed:,} more {counted} at the present rate"


def number(value: float) -> str:
    return f"{value:,.0f}" if 100 <= value < 1e9 else f"{value:.3g}"


def percent(share: float) -> str:
    return f"{100.0 * share:.3g} %"


def points(difference: float) -> str:
    return f"{100.0 * difference:.3g}"


def share(bad: float, units: float) -> str:
    return percent(bad / units) if units else "none"
