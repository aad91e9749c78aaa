"""What an engine may differ by, and what it may not: on numbers alone, and on a real model."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from rollout.artifacts import ArtifactStore
from rollout.engines import Engine
from rollout.errors import UnservableError
from rollout.versions import Version
from tests.trainer.answering import serving
from tests.trainer.samples import AT
from trainer.bundle import Probe
from trainer.proof import Proof, judge, measure, prove
from trainer.publish import publish_bundle

TOLERANCE = 0.002
# As measured on a random Llama in bfloat16.
ROUNDING = 0.086


def proof(**changes: float) -> Proof:
    """An engine in float32 that serves exactly what was trained."""
    right = {"adapter": 1e-5, "base": 1e-5, "effect": 0.5, "trained": 0.5, "scale": 1.0}
    return Proof("http://engine", 512, **{**right, **changes})


@pytest.mark.parametrize(
    "right",
    [
        proof(),
        proof(adapter=0.109, base=0.086, effect=0.72, trained=0.72, scale=1.0065),
        proof(adapter=0.0482, base=0.0633, effect=0.28, trained=0.288, scale=0.855),
    ],
)
def test_what_rounding_explains_passes(right: Proof) -> None:
    assert judge(right, "tiny-a", TOLERANCE, ROUNDING) == right


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (proof(base=0.3), "base is not the one that tiny-a was trained on"),
        (proof(effect=1e-5, adapter=0.5, scale=0.0), "changes nothing on the engine"),
        (proof(adapter=0.05, effect=0.55, scale=1.1), "is not the adapter that was trained"),
        (proof(adapter=0.9), "is not the adapter that was trained"),
        (proof(adapter=0.1, base=0.06, effect=0.35, trained=0.25, scale=1.5), "is not the adapter"),
        (proof(adapter=0.06, base=0.06, effect=0.1, trained=0.1), "changes so little"),
    ],
)
def test_what_rounding_does_not_explain_is_refused_with_its_reason(
    wrong: Proof, words: str
) -> None:
    with pytest.raises(UnservableError, match=words) as refused:
        judge(wrong, "tiny-a", TOLERANCE, ROUNDING)
    assert "rounding explains" in refused.value.message


def test_an_older_bundle_takes_no_excuse_for_another_base() -> None:
    with pytest.raises(UnservableError, match="base is not the one"):
        judge(proof(base=0.01), "tiny-a", TOLERANCE)


def a_probe(adapter: Sequence[float], base: Sequence[float]) -> Probe:
    return Probe([], list(range(len(adapter))), 0, adapter, base)


numbers = st.floats(-15, 0)


@given(
    st.lists(st.tuples(numbers, numbers), min_size=2, max_size=40).filter(
        lambda rows: any(abs(one - other) > 0.1 for one, other in rows)
    ),
    st.floats(0.2, 3.0),
)
def test_the_scale_of_an_effect_is_found(rows: list[tuple[float, float]], factor: float) -> None:
    adapter, base = [one for one, _ in rows], [other for _, other in rows]
    probes = [a_probe(adapter, base)]
    exact = measure("e", probes, [adapter], [base])
    assert (exact.adapter, exact.base) == (0, 0)
    assert exact.scale == pytest.approx(1.0)
    scaled = [max(-19.0, b + factor * (a - b)) for a, b in rows]
    # Nothing lies below the floor, where differences stop to count.
    if all(each > -19.0 for each in scaled):
        assert measure("e", probes, [scaled], [base]).scale == pytest.approx(factor)


@pytest.mark.anyio
async def test_a_prompt_that_offers_tools_is_proved_with_them() -> None:
    tools = [{"type": "function", "function": {"name": "find"}}]
    probe = Probe(
        [{"role": "user", "content": "?"}], [5, 6, 7], 2, [-0.1, -0.2], [-2.0, -3.0], tools
    )

    async def tokenize(request: Request) -> Response:
        offered = (await request.json()).get("tools")
        return JSONResponse({"tokens": [5, 6] if offered == tools else [5]})

    async def complete(request: Request) -> Response:
        given = probe.base if (await request.json())["model"] == "tiny" else probe.adapter
        pairs = zip(probe.ids[1:], given, strict=True)
        entries = [None, *({str(token): {"logprob": each}} for token, each in pairs)]
        return JSONResponse({"choices": [{"prompt_logprobs": entries}]})

    async with serving({"/tokenize": tokenize, "/v1/completions": complete}) as url:
        engine = Engine("main", (url,), "tiny")
        version = Version("triage", 2, "main", "tiny", AT, adapter="ab" * 32, adapter_path="/a")
        assert (await prove(engine, url, version, [probe], TOLERANCE)).scale == pytest.approx(1.0)
        without = replace(probe, tools=())
        with pytest.raises(UnservableError, match="another chat template"):
            await prove(engine, url, version, [without], TOLERANCE)


def test_only_what_cannot_run_code_is_published(tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    (folder / "pins.json").write_text(json.dumps({"rounding": 0.1}))
    artifacts = ArtifactStore((tmp_path / "artifacts").as_uri())
    assert publish_bundle(artifacts, folder).rounding == 0.1
    (folder / "adapter_model.bin").write_bytes(b"pickled")
    with pytest.raises(UnservableError, match=r"adapter_model\.bin is not published"):
        publish_bundle(artifacts, folder)
    assert len(artifacts.bundles()) == 1
