"""The pages for people say what the code does: every key, route, setting and link is held to it."""

import dataclasses
import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from gateway import app as data_plane
from gateway import errors as gateway_errors
from gateway.settings import (
    AdmissionSection,
    BalanceSection,
    CaptureSection,
    FeedbackSection,
    GatewaySettings,
    HealthSection,
    HedgeSection,
    UpstreamSection,
)
from gateway.shadow.settings import ShadowSettings
from rollout import errors, settings
from rollout.api.app import create_app
from rollout.cli import _parser
from rollout.control.views import Verb
from rollout.credentials import SCOPES
from rollout.errors import SluiceError
from rollout.evaluation import EvaluationRules
from rollout.plans import StepSpec
from rollout.policy import Policy, Slo
from rollout.redaction import RedactionSection
from rollout.retraining import Retrain
from rollout.routes import JsonRules, Judge, Semantic
from rollout.runs import RunState
from rollout.settings import (
    ArtifactsSection,
    ControllerSection,
    EngineSection,
    RouteSection,
    Settings,
    StoreSection,
    VllmSection,
    check_section,
    load_settings,
)
from rollout.stores import open_stores
from trainer.config import TrainingConfig
from trainer.settings import ExternalSettings, PriceSettings, TrainerSettings
from trainer.suites import read_suite

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]

SECTIONS: dict[str, type] = {
    "Top level": Settings,
    "[store]": StoreSection,
    "[artifacts]": ArtifactsSection,
    "[gateway]": GatewaySettings,
    "[gateway.upstream]": UpstreamSection,
    "[gateway.health]": HealthSection,
    "[gateway.balance]": BalanceSection,
    "[gateway.hedge]": HedgeSection,
    "[gateway.capture]": CaptureSection,
    "[gateway.admission]": AdmissionSection,
    "[gateway.feedback]": FeedbackSection,
    "[gateway.capture.redaction]": RedactionSection,
    "[controller]": ControllerSection,
    "[shadow]": ShadowSettings,
    "[trainer]": TrainerSettings,
    "[trainer.external]": ExternalSettings,
    "[trainer.prices]": PriceSettings,
    "[vllm]": VllmSection,
    "[[engines]]": EngineSection,
    "[[routes]]": RouteSection,
    "[routes.slo]": Slo,
    "[routes.policy]": Policy,
    "[[routes.policy.steps]]": StepSpec,
    "[routes.json_rules]": JsonRules,
    "[routes.semantic]": Semantic,
    "[routes.judge]": Judge,
    "[routes.evaluation]": EvaluationRules,
    "[routes.retrain]": Retrain,
}
# What `load_settings` fills in by itself, and what each role reads as a section of its own.
NO_KEYS: dict[type, set[str]] = {Settings: {"source", "gateway", "shadow", "trainer"}}
# Raised where no client is: within the trainer, and before a role has started.
NEVER_SENT = {"lease_lost", "invalid_configuration"}


@pytest.mark.parametrize("heading", SECTIONS)
def test_the_configuration_page_lists_each_key_with_its_default(heading: str) -> None:
    written = {
        cells[0].strip("`"): cells[2].strip("`*")
        for cells in table_under(heading, page("configuration"))
    }

    assert written == dict(keys_of(SECTIONS[heading]))


def test_no_section_is_left_out_of_the_configuration_page() -> None:
    headings = set(re.findall(r"^#+ (\[.*\])$", page("configuration"), re.MULTILINE))

    assert headings | {"Top level"} == set(SECTIONS)
    assert sections_of(Settings) | sections_of(GatewaySettings) | sections_of(
        CaptureSection
    ) | sections_of(RouteSection) | sections_of(TrainerSettings) | NO_KEYS[Settings] == {
        name.strip("[]").rpartition(".")[2] for name in headings
    } - {"steps"} | {"source"}


def test_the_variables_that_are_no_keys_are_on_the_configuration_page() -> None:
    rows = table_under("The environment", page("configuration"))

    assert {cells[0].strip("`") for cells in rows} == settings._OWN_VARIABLES


def test_the_complete_example_of_the_configuration_is_accepted(tmp_path: Path) -> None:
    text = block("toml", page("configuration"))
    (tmp_path / "sluice.toml").write_text(text)
    (tmp_path / "support-triage.schema.json").write_text('{"type": "object"}')
    example = load_settings(tmp_path / "sluice.toml", environ={})

    check_section(GatewaySettings, example.gateway, "gateway")
    check_section(ShadowSettings, example.shadow, "shadow")
    check_section(TrainerSettings, example.trainer, "trainer")
    assert [route.name for route in example.route_list()] == ["support-triage", "faq"]
    assert set(tomllib.loads(text)) == set(Settings.model_fields) - {"source", "vllm"}


def test_the_plans_on_the_operations_page_are_accepted(tmp_path: Path) -> None:
    _, _, text = page("operations").partition("## A rollout plan")
    plans = re.findall(r"^```toml\n(.*?)^```", text, re.DOTALL | re.MULTILINE)

    route = '[[routes]]\nname = "a"\nengine = "main"\nslo = { total_seconds = 2.0 }\n'
    for plan in plans[:2]:
        (tmp_path / "sluice.toml").write_text(route + plan)
        assert load_settings(tmp_path / "sluice.toml", environ={}).route_list()


@pytest.mark.anyio
async def test_the_api_page_lists_the_routes_of_the_control_plane(tmp_path: Path) -> None:
    # Nothing is asked of it, so it need not be there.
    async with open_stores("redis://127.0.0.1:1/0") as stores:
        described = create_app(stores, Settings(data_dir=tmp_path)).openapi()["paths"]
    there = {
        f"{method.upper()} {path}" for path, methods in described.items() for method in methods
    }

    rows = table_under("Control plane", page("api"))

    assert {cells[0].strip("`") for cells in rows} == there


def test_the_api_page_lists_the_paths_of_the_data_plane() -> None:
    written = {cells[0].strip("`") for cells in table_under("Data plane", page("api"))}
    there = {f"GET {path}" for path in data_plane._READ_PATHS}
    there |= {f"POST {path}" for path in data_plane._WRITE_PATHS}
    # What begins like this goes on to the controller, or to an engine.
    there |= {"/v1/files…`, `/v1/fine_tuning/…", "POST /v1/…"}

    assert written == there | {"GET /v1/models/{id}"}


def test_the_api_page_explains_each_error_scope_and_verb() -> None:
    text = page("api")
    codes = {f"`{code}`" for code in error_codes()}

    assert {code for code in codes if code not in text} == set()
    assert {cells[0].strip("`") for cells in table_under("Keys and scopes", text)} == SCOPES
    verbs = {cells[0].strip("`") for cells in table_under("Rollouts", text)}
    assert verbs >= set(get_args(Verb))


def test_the_training_page_lists_each_setting_with_its_default() -> None:
    rows = table_under("Settings of a run", page("training"))
    written = {cells[0].strip("`"): cells[1].strip("`") for cells in rows}

    assert written == dict(keys_of(TrainingConfig))


def test_the_training_page_explains_each_state_of_a_run() -> None:
    rows = table_under("Training", page("training"))

    assert {cells[0].strip("`") for cells in rows} == set(get_args(RunState))


def test_the_suite_on_the_training_page_can_be_read(tmp_path: Path) -> None:
    _, _, rest = page("training").partition("### A suite of your own")
    (tmp_path / "suite.jsonl").write_text(block("", rest))

    assert len(read_suite("support-triage", tmp_path / "suite.jsonl").rows) == 2


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_of_a_page_lead_somewhere(path: Path) -> None:
    assert [link for link in links_of(path) if not leads_somewhere(path, link)] == []


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_commands_in_the_blocks_of_a_page_are_accepted(path: Path) -> None:
    for arguments in commands_of(path):
        # argparse exits where it refuses, and says why.
        _parser().parse_args(arguments)


def page(name: str) -> str:
    return (DOCS / f"{name}.md").read_text(encoding="utf-8")


def table_under(heading: str, text: str) -> list[list[str]]:
    """The rows of all tables between a heading and the next one."""
    parts = re.split(r"^#+ (.*)$", text, flags=re.MULTILINE)
    found = dict(zip(parts[1::2], parts[2::2], strict=True))[heading]
    rows = [line for line in found.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows]
    lines = [place for place, row in enumerate(rows) if set(row) <= set("|- ")]
    # Above each line of dashes stands the head of its table.
    heads = {place - 1 for place in lines}
    return [row for place, row in enumerate(cells) if place not in heads and place not in lines]


def block(language: str, text: str) -> str:
    found = re.search(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert found is not None
    return found[1]


def keys_of(kind: Any) -> Iterator[tuple[str, str]]:
    """The keys of a section with their defaults, as the pages write them."""
    if issubclass(kind, BaseModel):
        left_out = NO_KEYS.get(kind, set()) | sections_of(kind)
        for name, field in kind.model_fields.items():
            if name not in left_out:
                yield field.alias or name, default_of(field)
    else:
        for each in dataclasses.fields(kind):
            default = each.default
            if each.default_factory is not dataclasses.MISSING:
                default = each.default_factory()
            required = default is dataclasses.MISSING
            yield each.name, "required" if required else written_as(default)


def sections_of(kind: type[BaseModel]) -> set[str]:
    """The fields of a section that are sections themselves, and have a table of their own."""
    return {
        name
        for name, field in kind.model_fields.items()
        if any(is_section(each) for each in (field.annotation, *get_args(field.annotation)))
    }


def is_section(kind: Any) -> bool:
    return isinstance(kind, type) and (
        issubclass(kind, BaseModel) or dataclasses.is_dataclass(kind)
    )


def default_of(field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=True, validated_data={})
    return "required" if default is PydanticUndefined else written_as(default)


def written_as(default: Any) -> str:
    if default is None:
        return "none"
    return json.dumps(str(default) if isinstance(default, Path) else default)


def error_codes() -> set[str]:
    kinds = [
        each
        for module in (errors, gateway_errors)
        for each in vars(module).values()
        if isinstance(each, type) and issubclass(each, SluiceError)
    ]
    return {kind.code for kind in kinds} - NEVER_SENT


def commands_of(path: Path) -> Iterator[list[str]]:
    """The arguments of each `sluice` command that stands on a line of a block."""
    blocks = re.findall(
        r"^```.*?\n(.*?)^```", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    for line in "".join(blocks).splitlines():
        if line.startswith("sluice "):
            words = shlex.split(line, comments=True)
            yield words[1 : words.index(">") if ">" in words else None]


def links_of(path: Path) -> list[str]:
    """Targets of links and images, those of code and of other sites left out."""
    text = re.sub(
        r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE
    )
    return [
        link
        for link in re.findall(r"\]\(([^)\s]+)\)", text)
        if not link.startswith(("http://", "https://", "mailto:"))
    ]


def leads_somewhere(path: Path, link: str) -> bool:
    name, _, anchor = link.partition("#")
    target = (path.parent / name).resolve() if name else path
    return target.exists() and (not anchor or anchor in anchors_of(target))


def anchors_of(path: Path) -> set[str]:
    """As GitHub makes them of headings: small letters, digits and dashes."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}
