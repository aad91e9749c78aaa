"""Which split a row belongs to, what is nearly the same, and that neither ever changes."""

from dataclasses import replace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.cases import LabelledCase
from tests.trainer.samples import compiled, labelled, reasons, sentences
from trainer.dataset import NOWHERE, compile_dataset, split_of
from trainer.dataset.near import is_near, near_pairs


def test_near_repeats_with_another_answer_stay_and_share_a_split() -> None:
    text = "the battery of this camera did {}last for three whole days of walking in the alps"
    dataset = compiled(
        labelled(1, text.format(""), "good"),
        labelled(2, text.format("not "), "bad"),
        labelled(3, "the screen broke on the very first day and nobody answered the phone", "bad"),
    )
    first, second, other = dataset.rows
    assert first.cluster == second.cluster != other.cluster
    assert first.split == second.split


@settings(max_examples=30)
@given(st.lists(st.integers(0, 200), unique=True, min_size=1), st.integers(1, 100))
def test_later_labels_never_move_an_earlier_row(numbers: list[int], cut: int) -> None:
    rows = sorted((sentences(201)[number] for number in numbers), key=lambda row: row.case.id)
    before = compile_dataset(rows[:cut], heldout=0.3, validation=0.1).dataset
    after = {
        row.case: row.split
        for row in compile_dataset(rows, heldout=0.3, validation=0.1).dataset.rows
    }
    assert all(after[row.case] == row.split for row in before.rows)


# Families of prompts, each a chain: neighbours are nearly the same, its two ends are not. None
# begins or ends as another does, for what most have in common is not compared.
BODIES = (
    "asks where the parcel went that was sent on the ninth of May and has not been seen since then",
    "wants all of the money back because the camera stopped working after two days in the mountains",
    "has forgotten the password again, and the link in the mail that we sent leads to an empty page",
    "thanks everybody at the counter for the kind words, and for the tea, and above all the biscuits",
)


FAMILIES = [
    f"{place * 10 + step}{'abcdefghijklmnopqr'[: 2 * step]} {body} {place * 10 + step}"
    for place, body in enumerate(BODIES)
    for step in range(10)
]


def test_the_families_are_chains() -> None:
    assert is_near(FAMILIES[3], FAMILIES[4])
    assert not is_near(FAMILIES[0], FAMILIES[9])


def batches() -> st.SearchStrategy[list[list[LabelledCase]]]:
    """Labels as they come in over time: any prompt, any answer, any order, some erased again."""
    row = st.builds(
        lambda place, at, gold: labelled(place * 1000 + at, FAMILIES[place], gold),
        st.integers(0, len(FAMILIES) - 1),
        st.integers(0, 999),
        st.sampled_from(["yes", "no"]),
    )
    return st.lists(st.lists(row, max_size=25), min_size=2, max_size=4)


@settings(max_examples=100)
@given(batches(), st.lists(st.floats(0, 0.6), min_size=4, max_size=4), st.booleans())
def test_what_was_held_out_once_is_never_trained_on(
    added: list[list[LabelledCase]], shares: list[float], erase: bool
) -> None:
    """Whatever is labelled, imported with older times, contradicted or erased in between."""
    places, held, known = NOWHERE, set[str](), list[LabelledCase]()
    for batch, share in zip(added, shares, strict=False):
        known = batch if erase else [*known, *batch]
        compiled = compile_dataset(known, heldout=share, validation=0.2, places=places)
        rows = compiled.dataset.rows
        texts = {row.messages[0]["content"]: row.split for row in rows}
        trained = {text for text, split in texts.items() if split != "heldout"}
        assert not held & trained
        held |= texts.keys() - trained
        # Nothing that is nearly the same lies on two sides.
        assert not [(a, b) for a in texts for b in texts if texts[a] < texts[b] and is_near(a, b)]
        places = replace(compiled.places, anchors={**compiled.places.anchors, **places.anchors})


@settings(max_examples=50)
@given(batches(), st.floats(0.1, 0.6))
def test_no_row_ever_changes_its_split(added: list[list[LabelledCase]], share: float) -> None:
    places, splits, known = NOWHERE, dict[str, str](), list[LabelledCase]()
    for batch in added:
        known = [*known, *batch]
        compiled = compile_dataset(known, heldout=share, validation=0.2, places=places)
        for row in compiled.dataset.rows:
            text = row.messages[0]["content"]
            assert splits.setdefault(text, row.split) == row.split
        places = replace(compiled.places, anchors={**compiled.places.anchors, **places.anchors})


@settings(max_examples=50)
@given(batches(), st.randoms(use_true_random=False))
def test_the_same_labels_in_any_order_are_the_same_bytes(
    added: list[list[LabelledCase]], dice: Any
) -> None:
    rows = list({row.case.id: row for batch in added for row in batch}.values())
    one = compile_dataset(rows, heldout=0.3)
    dice.shuffle(rows)
    other = compile_dataset(rows, heldout=0.3)
    assert (one.dataset, one.places) == (other.dataset, other.places)
    # What was built before changes nothing where the labels are the same.
    assert (
        compile_dataset(rows, heldout=0.3, places=one.places).dataset.digest == one.dataset.digest
    )


def test_a_row_that_would_lie_on_two_sides_is_dropped() -> None:
    text = "the battery of this camera lasted for three whole days in the high alps{}"

    def sides(share: float) -> set[str]:
        rows = compiled(*_apart(text), heldout=share).rows
        return {row.split for row in rows if row.case in ("c00001", "c00002")}

    share = next(each / 100 for each in range(100) if len(sides(each / 100)) == 2)
    bridge = labelled(3, text.format(" so I"), "bad")
    dataset = compiled(*_apart(text), bridge, heldout=share)
    assert reasons(dataset) == {"c00003": "is nearly the same as a row of another split"}


def _apart(text: str) -> list[LabelledCase]:
    """Two rows that have nothing to do with each other, and others, so that nothing is common."""
    return [
        labelled(1, text.format(""), "good"),
        labelled(2, text.format(" so I am told"), "good"),
        *sentences(40)[10:],
    ]


@settings(max_examples=50)
@given(st.lists(st.text(max_size=60), max_size=12))
def test_near_texts_are_near(texts: list[str]) -> None:
    for one, other in near_pairs(texts):
        assert one < other
        assert is_near(texts[one], texts[other])


def test_near_texts_among_very_many_that_are_alike_do_not_take_for_ever() -> None:
    texts = [f"order {number} of the customer was late again this week" for number in range(3_000)]
    assert len(near_pairs(texts)) < 200 * len(texts)


@given(st.text(), st.floats(0, 0.4), st.floats(0, 0.4))
def test_a_larger_share_only_adds_to_the_heldout_rows(name: str, one: float, other: float) -> None:
    small, large = sorted((one, other))
    assert split_of(name, heldout=small) != "heldout" or split_of(name, heldout=large) == "heldout"
