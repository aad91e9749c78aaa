"""How long the dataset compiler takes for 100,000 labelled rows, and how much memory.

    python -m benchmarks.dataset [--rows 100000] [--seed 1]

The rows are made up, from a seed: requests of ordinary lengths under one instruction, of which
known shares repeat another, nearly repeat one, contradict one, or were answered right by neither.
They are built in a process of its own, from the lines in which the store keeps them to the
dataset's bytes, as the trainer does it.
"""

import argparse
import itertools
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

from rollout.cases import Case, Choice, Label, LabelledCase
from rollout.exchanges import Answer
from rollout.redaction import Redactor
from rollout.stores.codec import decode, encode
from trainer.dataset import Manner, compile_dataset

_GOAL_SECONDS = 120.0
_GOAL_BYTES = 2 * 10**9
_AT = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
_INSTRUCTION = (
    "You read what a customer wrote to the support of an online shop. Answer with one word: the "
    "queue that it belongs to."
)
_ANSWERS = ("delivery", "refund", "account", "defect", "praise", "other")
_WEIGHTS = (30, 24, 18, 14, 8, 6)
_REPEATS, _NEARLY, _CONTRADICTS, _NEITHER, _PERSONAL = 0.05, 0.08, 0.04, 0.02, 0.03


def rows(count: int, seed: int) -> Iterator[tuple[str, LabelledCase]]:
    """Labelled cases, each with the name of what was planted in it."""
    dice = random.Random(seed)
    words = list(itertools.islice(_words(dice), 8_000))
    # Few words are common, as in any language.
    shares = list(itertools.accumulate(1 / (place + 10) for place in range(len(words))))
    earlier: list[tuple[str, str]] = []
    for number in range(count):
        chance = dice.random()
        planted, answer = "new", dice.choices(_ANSWERS, _WEIGHTS)[0]
        if earlier and chance < _REPEATS:
            planted, (text, answer) = "repeats", dice.choice(earlier)
            text = text.upper() if dice.random() < 0.5 else f"  {text} "
        elif earlier and chance < _REPEATS + _NEARLY:
            planted, (text, answer) = "nearly repeats", dice.choice(earlier)
            text = _blurred(text, dice)
        elif earlier and chance < _REPEATS + _NEARLY + _CONTRADICTS:
            planted, (text, before) = "contradicts", dice.choice(earlier)
            answer = next(each for each in _ANSWERS if each != before)
        else:
            length = min(300, max(4, int(dice.lognormvariate(3.6, 0.8))))
            text = " ".join(dice.choices(words, cum_weights=shares, k=length))
            if dice.random() < _PERSONAL:
                planted, text = "personal", f"{text} write to {dice.choice(words)}@example.org"
            elif dice.random() < _NEITHER:
                planted = "neither"
            else:
                earlier.append((text, answer))
        yield planted, _labelled(number, text, answer, planted)


def _words(dice: random.Random) -> Iterator[str]:
    consonants, vowels = "bcdfghklmnprstvwz", "aeiou"
    while True:
        pairs = (dice.choice(consonants) + dice.choice(vowels) for _ in range(dice.randint(1, 4)))
        yield "".join(pairs) + dice.choice(("", "n", "s", "t"))


def _blurred(text: str, dice: random.Random) -> str:
    """One letter in forty is another one."""
    letters = list(text)
    for _ in range(max(1, len(letters) // 40)):
        letters[dice.randrange(len(letters))] = dice.choice("xyzq")
    return "".join(letters)


def _labelled(number: int, text: str, answer: str, planted: str) -> LabelledCase:
    case = Case(
        id=f"case-{number:06d}",
        route="support",
        trial="support@2.2",
        request_id=f"request-{number:06d}",
        messages=(
            {"role": "system", "content": _INSTRUCTION},
            {"role": "user", "content": text},
        ),
        stable=Answer(version=1, status=200, text=answer),
        candidate=Answer(version=2, status=200, text="no queue at all"),
        agreement=0.0,
        kind="text",
        inclusion=0.25,
        priority=1.0,
        created_at=_AT,
    )
    choice: Choice = "first" if case.stable_first else "second"
    label = Label(
        case=case.id,
        route=case.route,
        choice="neither" if planted == "neither" else choice,
        labeler=f"labeler-{number % 7}",
        labelled_at=_AT + timedelta(seconds=number),
    )
    return LabelledCase(case, label)


def build(path: Path) -> None:
    """Build what is in the file, and print what it took as JSON."""
    began = time.perf_counter()
    redactor = Redactor()
    with path.open("rb") as file:
        labelled = [decode(LabelledCase, line) for line in file]
    read = time.perf_counter()
    manner = Manner(redactor.value)
    dataset = compile_dataset(labelled, heldout=0.2, validation=0.05, manner=manner).dataset
    done = time.perf_counter()
    report = {
        "read_seconds": read - began,
        "build_seconds": done - read,
        "seconds": done - began,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "digest": dataset.digest,
        "bytes": len(dataset.content),
        "stats": {**dataset.stats, "unanswered": len(dataset.unanswered)},
        "redacted": dict(dataset.redacted),
    }
    sys.stdout.write(json.dumps(report))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dataset")
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--build", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.build is not None:
        build(options.build)
        return 0
    planted: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "labelled.jsonl"
        with path.open("wb") as file:
            for name, row in rows(options.rows, options.seed):
                planted[name] += 1
                file.write(encode(row) + b"\n")
        print(f"{options.rows:,} labelled rows, {path.stat().st_size / 1e6:.0f} MB, planted:")
        print("  " + ", ".join(f"{count:,} {name}" for name, count in planted.most_common()))
        command = [sys.executable, "-m", "benchmarks.dataset", "--build", str(path)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    report = json.loads(done.stdout)
    _print(report)
    met = report["seconds"] <= _GOAL_SECONDS and report["peak_bytes"] <= _GOAL_BYTES
    return 0 if met else 1


def _print(report: dict[str, object]) -> None:
    stats = report["stats"]
    seconds, peak = float(str(report["seconds"])), float(str(report["peak_bytes"]))
    print(f"dataset {str(report['digest'])[:20]}, {int(str(report['bytes'])) / 1e6:.0f} MB")
    if isinstance(stats, dict):
        for name, value in stats.items():
            print(f"  {name}: {value}")
    print(f"  redacted: {report['redacted']}")
    print(
        f"seconds: {seconds:.1f} (goal: at most {_GOAL_SECONDS:.0f}), of which reading the labels"
    )
    print(
        f"  {float(str(report['read_seconds'])):.1f}, building {float(str(report['build_seconds'])):.1f}"
    )
    print(f"peak memory: {peak / 1e9:.2f} GB (goal: at most {_GOAL_BYTES / 1e9:.0f} GB)")


if __name__ == "__main__":
    sys.exit(main())
