"""`make bench-reviews`: what training on review sentences gives, and a second round of it.

    python -m benchmarks.reviews [--engine] [--threads N] [--train key=value …]

SmolLM2-135M learns from 960 sentences that twenty people rated. It answers 300 others, as it is,
under the best prompt that is found, and with its adapter; all are held to the three classes. Then
people label sentences on which base and adapter disagree, a second adapter learns from those too,
and has to pass the same gate against the first one.

Answers are taken in this process, by the likelihood of each class; with `--engine` those to the 300
sentences come from a real vLLM. Neither the 300 sentences nor what comes close to them are trained
on, chosen by, or looked at before the end.
"""

import argparse
import contextlib
import itertools
import os
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import tuning
from benchmarks.tuning import Adapter, Engine, say
from rollout.datasets import Dataset, Example, from_rows
from rollout.evaluation import EvaluationRules
from rollout.evidence import Report
from trainer import models
from trainer.base import BaseModel
from trainer.config import TrainingConfig
from trainer.dataset import compile_rows
from trainer.demo.sentences import Sentence, prompts, read_sentences, suite_rows
from trainer.evaluate import Graded, Messages, with_examples
from trainer.methods.likelihood import of_answers
from trainer.packing import Item, pack
from trainer.prompting import best, candidates
from trainer.rendering import Rendered, render_prompt
from trainer.suites import Suite, make_suite

ROUTE = "reviews"
SENTENCES = 960
HELDOUT = 300
# Sentences, of the 960, that say which prompts are the best, and which of those is the best.
CHOOSING = 150
FINALISTS = 4
DECIDING = 450
# Further sentences that base and adapter are asked in the second round.
POOL = 800
GOAL = 0.77
GOAL_P = 0.001
# As many examples in a forward pass as a small machine bears.
_ROW = 24


class Answers:
    """A model in this process, which answers with the likeliest of a row's choices.

    An engine that is held to the choices takes the likeliest token that begins one of them. That is
    the same where each is a token of its own, as the three classes are.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self._model = model.eval()
        self._tokenizer = tokenizer

    def answer(self, suite: Suite, prompt: Messages = ()) -> tuple[list[Graded], float]:
        """The answers to all rows, and the seconds that they took."""
        began = time.monotonic()
        said: list[str] = []
        for start in range(0, len(suite.rows), _ROW):
            asked = [
                (with_examples(row.messages, prompt), row.choices or ())
                for row in suite.rows[start : start + _ROW]
            ]
            items = [self._item(messages, choices) for messages, choices in asked]
            with torch.no_grad():
                likely = iter(of_answers(self._model, pack(items)).tolist())
            for _, choices in asked:
                mine = list(itertools.islice(likely, len(choices)))
                said.append(choices[mine.index(max(mine))])
        graded = [
            Graded(row.id, text, right=text == row.gold, seconds=0.0)
            for row, text in zip(suite.rows, said, strict=True)
        ]
        return graded, time.monotonic() - began

    def _item(self, messages: Messages, choices: Sequence[str]) -> Item:
        asked = render_prompt(self._tokenizer, messages)
        answers = (
            tuple(self._tokenizer.encode(each, add_special_tokens=False)) for each in choices
        )
        return Item(tuple(Rendered(asked + answer, len(asked)) for answer in answers))


@dataclass(frozen=True, slots=True)
class Sentences:
    """`first` are the labelled ones, `pool` those of which a second round may ask people."""

    first: Sequence[Sentence]
    pool: Sequence[Sentence]
    heldout: Sequence[Sentence]

    @classmethod
    def of(cls, every: Sequence[Sentence], labelled: int, heldout: int, pool: int) -> "Sentences":
        train = [each for each in every if each.split == "train"]
        held = [each for each in every if each.split == "heldout"]
        return cls(train[:labelled], train[labelled : labelled + pool], held[:heldout])

    def validation(self, share: float) -> frozenset[str]:
        """Those of the first that choose the step, in the second round too."""
        return frozenset(
            each.id for each in self.first[len(self.first) - round(len(self.first) * share) :]
        )


def dataset_of(
    sentences: Sequence[Sentence], heldout: Sequence[Sentence], validation: frozenset[str]
) -> Dataset:
    """By the dataset's rules: no duplicates, and nothing that is close to a held-out sentence."""
    rows = [
        Example(
            case=each.id,
            messages=each.messages,
            gold=each.label,
            labeler="readers",
            choice="first",
            inclusion=1.0,
            cluster="",
            split="train",
        )
        for each in sentences
    ]
    asked = [each.messages for each in heldout]
    compiled = compile_rows(rows, heldout=0.0, suite_prompts=asked).dataset
    split = from_rows(
        replace(row, split="validation" if row.case in validation else "train")
        for row in compiled.rows
    )
    return replace(split, dropped=compiled.dropped)


def best_prompt(
    base: Answers, first: Dataset, sentences: Sequence[Sentence], known: int | None = None
) -> Messages:
    """The prompt under which the base is right most often on labelled sentences.

    Of those that an evaluation looks for by itself and those that the demo tries; some sentences
    say which are the best of them, and others which of these is the best. `known` is the place of
    one that an earlier run found.
    """
    found = candidates(ROUTE, first, None, 1)
    tried: list[Messages] = [(), *(tuple(each[1:]) for each in prompts(sentences))]
    tried += found.prompts if found is not None else ()
    if known is not None:
        return tried[known]
    examples = {message["content"] for prompt in tried for message in prompt}
    unused = [each for each in sentences if each.text not in examples]
    rights = _rights(base, tried, unused[:CHOOSING])
    finalists = sorted(tried, key=lambda prompt: -rights[tried.index(prompt)])[:FINALISTS]
    rights = _rights(base, finalists, unused[CHOOSING : CHOOSING + DECIDING])
    chosen = finalists[best(rights, finalists)]
    say(f"  the best one is --prompt {tried.index(chosen)}")
    return chosen


def _rights(base: Answers, tried: Sequence[Messages], sentences: Sequence[Sentence]) -> list[int]:
    """How often the base is right under each of the prompts."""
    suite = make_suite(ROUTE, suite_rows(sentences))
    rights = [sum(each.right for each in base.answer(suite, prompt)[0]) for prompt in tried]
    say(f"  {len(tried)} prompts are right on {rights} of {len(sentences)} labelled sentences")
    return rights


def disagreeing(
    pool: Sequence[Sentence], one: Sequence[Graded], other: Sequence[Graded]
) -> list[Sentence]:
    """The sentences that the two answered differently."""
    answers = {each.row: each.answer for each in one}
    differing = {each.row for each in other if each.answer != answers[each.row]}
    return [each for each in pool if each.id in differing]


def goals(found: Report) -> list[str]:
    """Each figure that the first round is held to, with what was reached."""
    tuned, prompt = found.scores[0], found.beside[0]
    met = {True: "met", False: "NOT met"}
    return [
        f"right on at least {GOAL:.0%}: {tuned.mean:.1%}, {met[tuned.mean >= GOAL]}",
        f"better than the best prompt with p < {GOAL_P:g}: {prompt.gained} gained, {prompt.lost} "
        f"lost, p = {prompt.p_value:.2g}, "
        f"{met[prompt.difference > 0 and prompt.p_value < GOAL_P]}",
    ]


# What it stands for, its name, its adapter, and the prompt before its messages.
_Way = tuple[str, str, Adapter | None, Messages]
_FATE = {"pass": "an improvement", "fail": "refused", "inconclusive": "refused"}


class Bench:
    """The two rounds, one after the other."""

    def __init__(self, options: argparse.Namespace, base: BaseModel, engine: Engine | None) -> None:
        self._threads: int = options.threads
        self._config = TrainingConfig.from_mapping(dict(options.train))
        self._base = base
        self._tokenizer = models.load_tokenizer(self._base)
        self._sentences = Sentences.of(
            read_sentences(options.data_dir / "samples" / "reviews.jsonl"),
            options.sentences,
            options.heldout,
            options.pool,
        )
        self._suite = make_suite(ROUTE, suite_rows(self._sentences.heldout))
        self._rules = EvaluationRules()
        self._engine = engine
        self._answered: list[tuple[Any, tuple[list[Graded], float]]] = []
        self._prompt: int | None = options.prompt

    def run(self) -> None:
        sentences = self._sentences
        print(tuning.circumstances())
        validation = sentences.validation(self._config.validation)
        first = dataset_of(sentences.first, sentences.heldout, validation)
        print(tuning.describe("first round", first))
        prompt = best_prompt(self._with(None), first, sentences.first, self._prompt)
        one = self._train(first)
        others: list[_Way] = [("prompt", "best prompt", None, prompt)]
        found = self._report(
            [("version", "adapter 1", one, ()), ("parent", "base", None, ()), *others]
        )
        print(tuning.table(found))
        print("\n".join(goals(found)), flush=True)
        labelled = disagreeing(sentences.pool, *(self._asked_pool(each) for each in (None, one)))
        print(
            f"of {len(sentences.pool)} further sentences base and adapter 1 answer {len(labelled)} "
            "differently; people label those"
        )
        second = dataset_of([*sentences.first, *labelled], sentences.heldout, validation)
        print(tuning.describe("second round", second))
        two = self._train(second)
        others.append(("base", "base", None, ()))
        found = self._report(
            [("version", "adapter 2", two, ()), ("parent", "adapter 1", one, ()), *others]
        )
        print(tuning.table(found))
        print(f"the second round is {_FATE[found.outcome]}: {found.reason}")
        print(tuning.circumstances())

    def _train(self, dataset: Dataset) -> Adapter:
        adapter = tuning.train(self._base, dataset, self._config, threads=self._threads)
        print(adapter, flush=True)
        return adapter

    def _with(self, adapter: Adapter | None) -> Answers:
        model = models.load_base(self._base, torch.device("cpu"), torch.float32)
        if adapter is not None:
            model = models.with_adapter(model, adapter.folder)
        return Answers(model, self._tokenizer)

    def _asked_pool(self, adapter: Adapter | None) -> list[Graded]:
        suite = make_suite(ROUTE, suite_rows(self._sentences.pool))
        return self._with(adapter).answer(suite)[0]

    def _report(self, ways: Sequence[_Way]) -> Report:
        answered = [(way, name, *self._ask(adapter, prompt)) for way, name, adapter, prompt in ways]
        return tuning.report(self._suite, answered, self._rules)

    def _ask(self, adapter: Adapter | None, prompt: Messages) -> tuple[list[Graded], float]:
        """The held-out sentences, each way once."""
        key = (None if adapter is None else adapter.folder, prompt)
        if all(known != key for known, _ in self._answered):
            if self._engine is None:
                found = self._with(adapter).answer(self._suite, prompt)
            else:
                model = self._engine.base if adapter is None else self._engine.load(adapter.folder)
                found = self._engine.ask(model, self._suite, prompt=prompt)
            self._answered.append((key, found))
        return next(found for known, found in self._answered if known == key)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reviews")
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--model", default="smollm2-135m", help="a folder of data/models")
    parser.add_argument("--sentences", type=int, default=SENTENCES)
    parser.add_argument("--heldout", type=int, default=HELDOUT)
    parser.add_argument("--pool", type=int, default=POOL)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--prompt", type=int, help="the best prompt, as an earlier run said it")
    parser.add_argument("--engine", action="store_true", help="ask a real vLLM the held-out ones")
    parser.add_argument("--train", type=tuning.setting, nargs="*", default=[], metavar="KEY=VALUE")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    base = BaseModel.open(options.model, options.data_dir / "models" / options.model)
    with contextlib.ExitStack() as stack:
        engine = None
        if options.engine:
            engine = stack.enter_context(tuning.engine(base, threads=options.threads))
        Bench(options, base, engine).run()
    return 0


if __name__ == "__main__":
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        os.environ.setdefault(variable, "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.simplefilter("ignore")
    sys.exit(main())
