"""Which of many texts are nearly the same: found by MinHash, then compared letter by letter."""

from collections.abc import Iterator, Sequence
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

Words: TypeAlias = NDArray[np.uint32]
Pairs: TypeAlias = NDArray[np.int64]

# Texts that are this alike (0 to 100, by the letters to insert and delete) say the same.
NEAR: Final = 95.0

# Each text's pieces of so many letters; two texts that share the least piece by each of _ROWS
# hashes in one of _BANDS bands are compared. At the limit of 95 %, with a letter in twenty changed,
# two thirds of the pieces are shared, and 999 pairs of 1000 are found.
_SHINGLE: Final = 4
_ROWS: Final = 4
_BANDS: Final = 40
_HASHES: Final = _ROWS * _BANDS
# Pairs whose hashes agree less often are not worth comparing: 95 % alike means 0.5 or more.
_ALIKE: Final = 0.4
# In each band a text is compared with so many of those that sort next to it (fewer where more are
# equal), and in all with so many that share the most bands: thousands of texts from one template
# must not take for ever.
_WINDOW: Final = 12
_WINDOW_OF_MANY: Final = 3
_MOST: Final = 32
# Of few texts more may be compared: so many pairs take a second or two.
_AFFORDABLE: Final = 1_000_000
# How many pairs wait to be counted; 32 MB of them.
_WAITING: Final = 1 << 22
# Of a text so short one changed letter spoils most pieces; it is compared too with those that sort
# next to it, read forwards and backwards.
_SHORT: Final = 32
# How many letters are hashed in one step; half a megabyte stays in a core's cache.
_STEP: Final = 1 << 17
# Longer texts are compared word by word.
_LETTERS: Final = 4_000
_BATCH: Final = 20_000


def near_pairs(texts: Sequence[str]) -> list[tuple[int, int]]:
    """The places (i < j) of texts that are nearly the same, sorted.

    A pair that shares little in every part of its text may be missed (one in a thousand), as may
    most of the pairs among thousands of texts that are all alike; each of those has some.
    """
    if len(texts) < 2:
        return []
    codes = np.union1d(_candidates(texts, _signatures(texts)), _short_candidates(texts))
    first, second = np.divmod(codes, len(texts))
    found: list[tuple[int, int]] = []
    for start in range(0, len(first), _BATCH):
        part = slice(start, start + _BATCH)
        ones, others = first[part].tolist(), second[part].tolist()
        scores = _scores([texts[i] for i in ones], [texts[j] for j in others])
        found += [(i, j) for i, j, score in zip(ones, others, scores, strict=True) if score >= NEAR]
    return found


def is_near(one: str, other: str) -> bool:
    return bool(_scores([one], [other])[0] >= NEAR)


def _scores(ones: Sequence[str], others: Sequence[str]) -> Sequence[float]:
    from rapidfuzz import fuzz

    return [
        fuzz.ratio(_units(one, other), _units(other, one), score_cutoff=NEAR)
        for one, other in zip(ones, others, strict=True)
    ]


def _units(text: str, beside: str) -> Any:
    return text if max(len(text), len(beside)) <= _LETTERS else text.split(" ")


def _signatures(texts: Sequence[str]) -> Words:
    """For each text the least of each hash over its pieces: shape (texts, _HASHES)."""
    factors, offsets = _constants()
    signatures: Words = np.empty((len(texts), _HASHES), dtype=np.uint32)
    for low, high in _steps([len(text) for text in texts]):
        pieces, starts = _pieces(texts[low:high])
        for place in range(_HASHES):
            hashed = pieces * factors[place] + offsets[place]
            signatures[low:high, place] = np.minimum.reduceat(hashed, starts)
    return signatures


def _steps(lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    low = letters = 0
    for place, length in enumerate(lengths):
        letters += length
        if letters >= _STEP:
            yield low, place + 1
            low, letters = place + 1, 0
    if low < len(lengths):
        yield low, len(lengths)


def _pieces(texts: Sequence[str]) -> tuple[Words, NDArray[np.int64]]:
    """Every piece of every text as a hash, and where each text's first one stands."""
    padded = [text.ljust(_SHINGLE, "\0") for text in texts]
    lengths = np.array([len(text) for text in padded], dtype=np.int64)
    letters: Words = np.frombuffer(
        "".join(padded).encode("utf-32-le", "surrogatepass"), dtype=np.uint32
    )
    hashed = np.zeros(len(letters) - _SHINGLE + 1, dtype=np.uint32)
    for place in range(_SHINGLE):
        hashed *= np.uint32(0x9E3779B1)
        hashed += letters[place : place + len(hashed)] + np.uint32(1)
    ends = np.cumsum(lengths)
    # Pieces that begin in one text and end in the next are nobody's.
    whole = np.ones(len(hashed), dtype=bool)
    for back in range(1, _SHINGLE):
        whole[ends[:-1] - back] = False
    counts = lengths - _SHINGLE + 1
    return _mixed(hashed[whole]), np.cumsum(counts) - counts


def _mixed(values: Words) -> Words:
    """Murmur's last step: every bit of a piece counts for every bit of its hash."""
    values ^= values >> np.uint32(16)
    values *= np.uint32(0x85EBCA6B)
    values ^= values >> np.uint32(13)
    values *= np.uint32(0xC2B2AE35)
    values ^= values >> np.uint32(16)
    return values


def _constants() -> tuple[Words, Words]:
    """The same in every process: an odd factor is a permutation of all 32-bit numbers."""
    seeds: Words = np.arange(1, 2 * _HASHES + 1, dtype=np.uint32) * np.uint32(0x9E3779B1)
    mixed = _mixed(seeds)
    return mixed[:_HASHES] | np.uint32(1), mixed[_HASHES:]


def _candidates(texts: Sequence[str], signatures: Words) -> Pairs:
    """Pairs worth comparing, as `i * len(texts) + j`."""
    count = len(texts)
    keys = _band_keys(signatures)
    lengths = np.array([len(text) for text in texts], dtype=np.int64)
    codes, shared = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    waiting: list[Pairs] = []
    for band in range(_BANDS):
        more = _in_band(keys, band, count)
        waiting.append(more[_may_be_near(more, lengths)])
        if band == _BANDS - 1 or sum(map(len, waiting)) > _WAITING:
            codes, shared = _counted(codes, shared, waiting)
            waiting = []
    alike = _agreement(signatures, *np.divmod(codes, count)) >= _ALIKE
    codes, shared = codes[alike], shared[alike]
    return codes[_most_alike(codes % count, shared, max(_MOST, _AFFORDABLE // count))]


def _may_be_near(codes: Pairs, lengths: NDArray[np.int64]) -> NDArray[np.bool_]:
    """No texts of lengths further apart are 95 % alike; words of long texts differ in length."""
    first, second = np.divmod(codes, len(lengths))
    both = lengths[first] + lengths[second]
    close: NDArray[np.bool_] = abs(lengths[first] - lengths[second]) * 100 <= (100 - NEAR) * both
    return close | (both > 2 * _LETTERS)


def _short_candidates(texts: Sequence[str]) -> Pairs:
    short = [place for place, text in enumerate(texts) if len(text) <= _SHORT]
    found: list[Pairs] = [np.empty(0, dtype=np.int64)]
    for way in (1, -1):
        order = np.array(sorted(short, key=lambda place: texts[place][::way]), dtype=np.int64)
        for step in range(1, min(_WINDOW, len(order) - 1) + 1):
            ones, others = order[step:], order[:-step]
            found.append(np.minimum(ones, others) * len(texts) + np.maximum(ones, others))
    codes = np.unique(np.concatenate(found))
    lengths = np.array([len(text) for text in texts], dtype=np.int64)
    return codes[_may_be_near(codes, lengths)]


def _band_keys(signatures: Words) -> NDArray[np.uint64]:
    """A number for each band of each text, equal where all hashes of the band are: (bands, texts)."""
    keys = np.zeros((_BANDS, len(signatures)), dtype=np.uint64)
    for row in range(_ROWS):
        keys *= np.uint64(0x9E3779B97F4A7C15)
        keys += signatures[:, row::_ROWS].T
        keys ^= keys >> np.uint64(29)
    return keys


def _in_band(keys: NDArray[np.uint64], band: int, count: int) -> Pairs:
    """Pairs of texts that are equal in this band, as `i * count + j`.

    Those that are equal in the next bands too sort together, so that a window finds them.
    """
    after = [keys[(band + step) % _BANDS] for step in (2, 1, 0)]
    order = np.lexsort(after)
    sorted_keys = after[-1][order]
    # How many texts are equal to each in this band.
    same = np.searchsorted(sorted_keys, sorted_keys, "right") - np.searchsorted(
        sorted_keys, sorted_keys, "left"
    )
    few = same <= _WINDOW
    found: list[Pairs] = [np.empty(0, dtype=np.int64)]
    for step in range(1, min(_WINDOW, count - 1) + 1):
        equal = sorted_keys[step:] == sorted_keys[:-step]
        (places,) = np.nonzero(equal if step <= _widest(count) else equal & few[step:])
        ones, others = order[places], order[places + step]
        found.append(np.minimum(ones, others) * count + np.maximum(ones, others))
    return np.concatenate(found)


def _widest(count: int) -> int:
    """How many of its neighbours a text is compared with that equals very many in a band."""
    return max(_WINDOW_OF_MANY, min(_WINDOW, _AFFORDABLE // (4 * count)))


def _counted(codes: Pairs, shared: Pairs, more: Sequence[Pairs]) -> tuple[Pairs, Pairs]:
    """Each pair once, with the number of bands that it was found in."""
    new, counts = np.unique(np.concatenate(more), return_counts=True)
    if not len(codes):
        return new, counts
    together, weights = np.concatenate((codes, new)), np.concatenate((shared, counts))
    order = np.argsort(together, kind="stable")
    together, weights = together[order], weights[order]
    (starts,) = np.nonzero(np.concatenate(([True], together[1:] != together[:-1])))
    return together[starts], np.add.reduceat(weights, starts)


def _agreement(signatures: Words, first: Pairs, second: Pairs) -> NDArray[np.float64]:
    agreement = np.empty(len(first), dtype=np.float64)
    for start in range(0, len(first), _BATCH):
        part = slice(start, start + _BATCH)
        same = signatures[first[part]] == signatures[second[part]]
        agreement[part] = same.mean(axis=1)
    return agreement


def _most_alike(second: Pairs, shared: Pairs, most: int) -> NDArray[np.int64]:
    """The places of at most so many pairs of each `second`, those with the most bands."""
    order = np.lexsort((-shared, second))
    owners = second[order]
    starts = np.concatenate(([True], owners[1:] != owners[:-1])) if len(owners) else owners == 0
    begins = np.maximum.accumulate(np.where(starts, np.arange(len(owners)), 0))
    kept: NDArray[np.int64] = order[np.arange(len(owners)) - begins < most]
    return kept
