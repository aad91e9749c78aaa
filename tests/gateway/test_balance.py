"""How requests are shared out among replicas, with nothing but values."""

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from gateway.balance import nearest, pick, prompt_prefix, taking_part, weight

LOADS = st.lists(st.integers(0, 60), min_size=1, max_size=8)
KEYS = st.binary(max_size=40)
WEIGHTS = st.lists(st.floats(0.1, 1.0), min_size=1, max_size=8)
CHANCES = [(number + 0.5) / 2_000 for number in range(2_000)]


@dataclass(frozen=True, slots=True)
class Replica:
    url: str
    inflight: int = 0


def fleet(*loads: int) -> list[Replica]:
    return [Replica(f"http://engine-{number}", load) for number, load in enumerate(loads)]


@given(st.floats(0, 100), st.floats(0, 100), st.floats(0.1, 60))
def test_a_replica_that_came_back_gets_more_and_more(
    earlier: float, later: float, seconds: float
) -> None:
    earlier, later = sorted((earlier, later))
    assert 0 < weight(0.0, earlier, seconds) <= weight(0.0, later, seconds) <= 1


def test_its_share_rises_in_a_straight_line() -> None:
    assert [weight(100.0, 100.0 + after, 10) for after in (0, 2.5, 5, 10, 99)] == [
        0.1, 0.25, 0.5, 1, 1,
    ]  # fmt: skip
    assert weight(None, 0.0, 10) == 1
    assert weight(0.0, 0.0, 0) == 1


@given(WEIGHTS, st.floats(0, 1, exclude_max=True))
def test_the_heaviest_takes_part_always_and_more_weight_never_takes_one_out(
    weights: list[float], chance: float
) -> None:
    replicas = fleet(*(0 for _ in weights))
    found = taking_part(replicas, weights, chance)
    assert replicas[weights.index(max(weights))] in found
    heavier = [min(one * 1.2, max(weights)) for one in weights]
    assert set(found) <= set(taking_part(replicas, heavier, chance))


@given(WEIGHTS)
def test_each_takes_part_as_often_as_its_weight_says(weights: list[float]) -> None:
    replicas = fleet(*(0 for _ in weights))
    rounds = [taking_part(replicas, weights, chance) for chance in CHANCES]
    for replica, one in zip(replicas, weights, strict=True):
        share = sum(replica in found for found in rounds) / len(rounds)
        assert abs(share - one / max(weights)) < 0.001


def test_an_idle_replica_that_came_back_is_not_run_over() -> None:
    busy, cold = fleet(50, 0)
    picked = [
        pick(taking_part([busy, cold], [1.0, 0.1], chance), round(chance * 2**32))
        for chance in CHANCES
    ]
    assert 0.09 < picked.count(cold) / len(picked) < 0.11


@given(LOADS, KEYS, st.floats(1, 3))
def test_affinity_never_goes_far_over_the_mean(loads: list[int], key: bytes, load: float) -> None:
    found = nearest(fleet(*loads), key, load)
    assert found.inflight < load * sum(loads) / len(loads) + 1


@given(st.integers(2, 8), KEYS, st.integers(0, 7))
def test_a_replica_that_goes_moves_only_its_own_keys(count: int, key: bytes, gone: int) -> None:
    replicas = fleet(*(0 for _ in range(count)))
    before = nearest(replicas, key, 1.25)
    left = replicas[: gone % count] + replicas[gone % count + 1 :]
    if before in left:
        assert nearest(left, key, 1.25) == before


@given(st.permutations(fleet(3, 1, 4, 1, 5)), KEYS)
def test_every_gateway_finds_the_same_replica(order: list[Replica], key: bytes) -> None:
    assert nearest(order, key, 1.25) == nearest(fleet(3, 1, 4, 1, 5), key, 1.25)


def test_keys_spread_over_the_replicas() -> None:
    replicas = fleet(0, 0, 0, 0)
    found = [nearest(replicas, b"%d" % number, 1.25) for number in range(4_000)]
    assert all(850 < found.count(replica) < 1_150 for replica in replicas)


def test_a_prompt_that_everybody_uses_spreads_when_its_replica_has_too_much() -> None:
    loads = [0, 0, 0]
    for _ in range(300):
        found = nearest(fleet(*loads), b"the same", 1.25)
        loads[int(found.url[-1])] += 1
    assert max(loads) <= 1.25 * 100 + 1
    assert min(loads) > 0


def test_the_prefix_is_what_the_prompt_begins_with() -> None:
    one = b'{"model":"r","messages":[{"role":"system","content":"Be brief."}],"n":1}'
    other = b'{"model":"r@7","temperature":0,"messages":[{"role":"system","content":"Be kind"}]}'
    assert prompt_prefix(one, 30) == prompt_prefix(other, 30)
    assert prompt_prefix(one, 60) != prompt_prefix(other, 60)
    assert prompt_prefix(b'{"model":"r","prompt":"Hi"}', 256) == b'"prompt":"Hi"}'
    assert prompt_prefix(b'{"model":"r"}', 256) == b""


@given(st.text(), st.integers(1, 300))
def test_the_prefix_is_cut_between_characters(text: str, characters: int) -> None:
    found = prompt_prefix(b'{"messages":' + text.encode(errors="ignore"), characters)
    assert len(found.decode()) <= characters + len('"messages"')
