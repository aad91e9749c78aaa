"""A configuration is read whole, or refused with the key and what is wrong with it."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from rollout.errors import ConfigError
from rollout.plans import StepSpec
from rollout.settings import EngineSection, Settings, load_settings

WHOLE = """
data_dir = "./here"
[controller]
port = 9001
[[engines]]
name = "main"
urls = ["http://a:1/v1", "http://b:2/"]
base = "tiny"
[[routes]]
name = "triage"
engine = "main"
schema = "triage.json"
slo = { ttft_seconds = 0.5 }
[routes.policy]
alpha = 0.01
"""


def load(folder: Path, text: str, environ: dict[str, str] | None = None) -> Settings:
    path = folder / "sluice.toml"
    path.write_text(text)
    return load_settings(path, environ or {})


def test_a_whole_file(tmp_path: Path) -> None:
    (tmp_path / "triage.json").write_text('{"type": "string"}')
    settings = load(tmp_path, WHOLE)
    (engine,) = settings.engine_list()
    assert engine.urls == ("http://a:1", "http://b:2")
    (route,) = settings.route_list()
    assert route.schema == '{"type": "string"}'
    assert (route.slo.ttft_seconds, route.policy.alpha) == (0.5, 0.01)
    assert settings.data_path == tmp_path / "here"
    assert settings.artifacts_url == (tmp_path / "here/artifacts").as_uri()


def test_the_environment_wins_over_the_file(tmp_path: Path) -> None:
    environ = {
        "SLUICE_CONTROLLER__PORT": "9002",
        "SLUICE_STORE__URL": "redis://h:1/0",
        "SLUICE_ENGINES": '[{"name": "e", "urls": ["http://c:3"], "base": "b"}]',
        "SLUICE_BOOTSTRAP_KEY": "sk-1",
        "UNRELATED": "x",
    }
    settings = load(tmp_path, "[controller]\nport = 9001\n", environ)
    assert settings.controller.port == 9002
    assert settings.store_url == "redis://h:1/0"
    assert settings.engine_list()[0].urls == ("http://c:3",)


@pytest.mark.parametrize(
    ("text", "environ", "message"),
    [
        ("[controller]\nprot = 1\n", {}, "controller.prot: nothing reads this key"),
        ("[controller]\nport = 70000\n", {}, "controller.port"),
        ('[[routes]]\nname = "Bad Name"\nengine = "e"\n', {}, "no route name"),
        (WHOLE.replace("alpha = 0.01", "alpha = 7"), {}, "alpha is 7"),
        (WHOLE.replace('engine = "main"', 'engine = "mian"'), {}, "names engine 'mian'"),
        ("data_dir = 'x'\n", {"SLUICE_DATA_DIR__X": "1"}, "SLUICE_DATA_DIR__X"),
        ("data_dir =\n", {}, "no valid TOML"),
    ],
)
def test_what_is_wrong_is_named(
    tmp_path: Path, text: str, environ: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, text, environ)


def test_a_missing_schema_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the schema .*triage\.json"):
        load(tmp_path, WHOLE).route_list()


def test_a_missing_store_is_explained(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no store is configured"):
        _ = load(tmp_path, "").store_url


@pytest.mark.parametrize("url", ["dns+https://engine:8100", "dns+http://engine", "dns://engine:1"])
def test_a_name_in_dns_has_one_form(url: str) -> None:
    assert EngineSection(name="main", base="b", urls=("dns+http://engine:8100/v1",)).engine().urls
    with pytest.raises(ValidationError, match="dns\\+http://NAME:PORT"):
        EngineSection(name="main", base="b", urls=(url,))


@pytest.mark.parametrize(
    ("step", "says"),
    [
        ("percent = 0.5", "line 18: routes.0.policy.steps.1: 0.5 % comes behind 1 %"),
        ("percent = 500", "line 19: routes.0.policy.steps.1.percent: 500 is no percentage"),
        ('percent = "5"\nunits = 3', "line 20: routes.0.policy.steps.1.units: nothing reads this"),
        ('percent = 5\ngates = ["total"]', "line 20: routes.0.policy.steps.1.gates: `total` could"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused_with_its_line(
    tmp_path: Path, step: str, says: str
) -> None:
    (tmp_path / "triage.json").write_text("{}")
    steps = "[[routes.policy.steps]]\npercent = 1\n[[routes.policy.steps]]\n"
    with pytest.raises(ConfigError) as refusal:
        load(tmp_path, WHOLE + steps + step)
    assert says in refusal.value.message


def test_a_plan_may_be_short_or_say_more(tmp_path: Path) -> None:
    (tmp_path / "triage.json").write_text("{}")
    steps = 'steps = [1, { percent = 20, approval = true, gates = ["pairs", "ttft"] }]\n'
    (route,) = load(tmp_path, WHOLE + steps).route_list()
    assert route.policy.steps == (1.0, StepSpec(20.0, approval=True, gates=("pairs", "ttft")))


@pytest.mark.parametrize(
    ("table", "field"),
    [
        ('judge = { engine = "nowhere" }', "routes.judge.engine"),
        ('semantic = { engine = "nowhere" }', "routes.semantic.engine"),
    ],
)
def test_an_engine_that_a_route_compares_by_must_exist(
    tmp_path: Path, table: str, field: str
) -> None:
    path = tmp_path / "sluice.toml"
    path.write_text(
        '[[engines]]\nname = "main"\nurls = ["http://127.0.0.1:1"]\nbase = "b"\n'
        f'[[routes]]\nname = "r"\nengine = "main"\n{table}\n'
    )
    with pytest.raises(ConfigError) as caught:
        load_settings(path, environ={})
    assert caught.value.param == field


def test_a_judge_without_an_engine_is_refused_with_its_key(tmp_path: Path) -> None:
    path = tmp_path / "sluice.toml"
    path.write_text('[[routes]]\nname = "r"\nengine = "main"\njudge = { decide = true }\n')
    with pytest.raises(ConfigError) as caught:
        load_settings(path, environ={})
    assert "judge" in caught.value.message
