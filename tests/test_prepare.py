"""What a first start fetches is parsed, classed and split the same way on every machine."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout.errors import InvalidInputError, UnavailableError
from trainer import prepare
from trainer.prepare import decode, normalised, parse_reviews, sentiment, split_of

TEXTS = (
    "1_1\t-0.9\tno picture, scrolling b/w.\r\n1_2\t2.5\tit\u2028works\twell!\r\n1_3\t0.5\tok.\r\n"
)
RATINGS = (
    "1_1\t-0.9\t0.7\t[0, -1, -2, -1]\r\n1_2\t2.5\t0.5\t[2, 3, 2, 3]\r\n1_3\t0.5\t1.0\t[0, 2, 0, 0]"
)


def test_a_review_holds_every_rating_and_what_follows_from_them() -> None:
    first, second, third = parse_reviews(TEXTS, RATINGS)

    assert (first.id, first.text) == ("1_1", "no picture, scrolling b/w.")
    assert first.ratings == (0, -1, -2, -1)
    assert (first.mean, first.label, first.share) == (-1.0, "negative", 0.75)
    assert (second.label, second.share) == ("positive", 1.0)
    assert (third.mean, third.label, third.share) == (0.5, "neutral", 0.75)


def test_a_sentence_may_hold_a_tab_or_a_line_separator() -> None:
    assert parse_reviews(TEXTS, RATINGS)[1].text == "it\u2028works\twell!"


@pytest.mark.parametrize(
    ("mean", "label"),
    [(-4, "negative"), (-0.51, "negative"), (-0.5, "neutral"), (0, "neutral"), (0.5, "neutral"),
     (0.55, "positive"), (1, "positive")],
)  # fmt: skip
def test_sentences_near_zero_are_neutral(mean: float, label: str) -> None:
    assert sentiment(mean) == label


def test_of_repeated_sentences_the_first_stays_and_wordless_ones_go() -> None:
    texts = "a\t1\tWell  worth it!\nb\t1\twell worth it\nc\t1\t...\n"
    ratings = "a\t1\t0\t[1]\nb\t1\t0\t[2]\nc\t1\t0\t[0]\n"

    assert [review.id for review in parse_reviews(texts, ratings)] == ["a"]


@pytest.mark.parametrize(
    ("texts", "ratings", "message"),
    [
        ("a\t1\tx", "b\t1\t0\t[1]", "ratings, line 1: no text has the id b"),
        ("a\t1\tx", "a\t1\t0\t[1.5]", "ratings, line 1: not a list of whole numbers"),
        ("a\t1\tx", "a\t1\t0\t[]", "ratings, line 1: not a list of whole numbers"),
        ("a\t1\tx", "a\t1\t0\t__import__('os')", "ratings, line 1: not a list of whole numbers"),
        ("a\t1\tx\nb\t1", "a\t1\t0\t[1]", "texts, line 2: 2 columns instead of 3"),
    ],
)
def test_a_broken_line_is_named(texts: str, ratings: str, message: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        parse_reviews(texts, ratings)

    assert caught.value.message.startswith(message)


def test_a_stray_byte_spoils_no_other_line() -> None:
    assert decode(b"\xef\xbb\xbfcaf\xc3\xa9\ncaf\xe9\n") == "café\ncafé\n"


@given(st.text(), st.sampled_from(["{}", " {}!", "{}\n", "«{}»"]))
def test_a_text_is_in_the_same_split_however_it_is_written(text: str, around: str) -> None:
    assert split_of(around.format(text)) == split_of(text)
    assert normalised(normalised(text)) == normalised(text)


def test_the_split_never_changes() -> None:
    """Held-out sentences that once moved would have been trained on."""
    known = {"it works well": "train", "a": "heldout"}
    assert {text: split_of(text) for text in known} == known


def test_what_is_there_already_is_left_alone(tmp_path: Path) -> None:
    reviews = tmp_path / prepare.REVIEWS_FILE
    reviews.parent.mkdir(parents=True)
    reviews.write_text("mine")

    prepare.prepare(tmp_path, ["reviews"])

    assert reviews.read_text() == "mine"


def test_a_data_directory_that_cannot_be_made_is_a_message(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(UnavailableError, match="cannot write below"):
        prepare.prepare(tmp_path / "file" / "data", ["reviews"])


def test_an_index_that_does_not_answer_is_a_message_and_leaves_nothing(tmp_path: Path) -> None:
    environment = {
        "PIP_CONFIG_FILE": "/dev/null",
        "PIP_NO_CACHE_DIR": "1",
        "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
        "PIP_RETRIES": "0",
        "PATH": "/usr/bin:/bin",
    }
    command = [sys.executable, "-m", "trainer.prepare", "--only", "reviews"]
    done = subprocess.run(
        [*command, "--data-dir", tmp_path], env=environment, capture_output=True, text=True
    )

    assert done.returncode == 1
    assert "could not fetch vaderSentiment==2.5" in done.stderr
    assert "Traceback" not in done.stderr
    assert list((tmp_path / "samples").iterdir()) == []


@pytest.mark.slow
def test_the_real_sentences(tmp_path: Path) -> None:
    prepare.prepare(tmp_path, ["reviews"])

    rows = [json.loads(line) for line in (tmp_path / prepare.REVIEWS_FILE).read_text().splitlines()]
    held_out = [row for row in rows if row["split"] == "heldout"]
    positive = sum(row["label"] == "positive" for row in rows) / len(rows)
    assert len(rows) == 3687
    assert len(held_out) >= 300
    assert all(len(row["ratings"]) == 20 for row in rows)
    assert round(positive, 2) == 0.46
