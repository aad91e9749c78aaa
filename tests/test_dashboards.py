"""What ops look at exists: every metric of the dashboard and the alerts, tried on a real Prometheus."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import httpx2
import pytest
import yaml
from prometheus_client import CollectorRegistry, start_http_server

from gateway.metrics import Metrics
from gateway.routing import index
from gateway.shadow.metrics import ShadowMetrics
from rollout.catalog import Catalog
from rollout.cli import main
from rollout.engines import Engine, Residency
from rollout.evidence import Evidence, PairCounts
from rollout.gates import judge
from rollout.metrics import CaseCounts, ControllerMetrics, Seen
from rollout.policy import Policy
from rollout.routes import Route
from rollout.runs import RunEvent
from rollout.state import Rollout, Trial
from rollout.versions import Version
from tests.system import RunningSluice, eventually, free_port

ROOT = Path(__file__).parent.parent
DASHBOARD = json.loads((ROOT / "dashboards" / "sluice.json").read_text())
ALERTS_FILE = ROOT / "dashboards" / "alerts.yml"
RUNBOOK = ROOT / "docs" / "operations.md"
RULES = [
    rule for group in yaml.safe_load(ALERTS_FILE.read_text())["groups"] for rule in group["rules"]
]
# How the samples of each type end.
SAMPLES = {"counter": ("total",), "histogram": ("bucket", "count", "sum")}

# With traffic and nothing else going on, these show something.
CORE_PANELS = (
    "Requests/s",
    "Error ratio",
    "Total time, p99",
    "Store",
    "Requests/s by code",
    "Total time",
    "Time to first token by version",
    "In flight",
    "Engine replicas up",
    "Revision that each gateway serves",
    "Share of traffic by version",
    "Stage of each trial",
    "Overhead, p99",
    "Event loop lag",
)
# The variables of the dashboard, as Grafana fills them in when all routes are chosen.
VARIABLES = {"$__rate_interval": "1m", "$route": ".*", "$version": ".*"}


class Query(NamedTuple):
    panel: str
    expr: str
    # Labels that the legend shows, so that each series has to have them.
    labels: tuple[str, ...] = ()


def dashboard_queries() -> list[Query]:
    panels = [
        Query(panel["title"], target["expr"], labels_in(target["legendFormat"]))
        for panel in DASHBOARD["panels"]
        for target in panel.get("targets", [])
    ]
    marks = [Query(mark["name"], mark["expr"]) for mark in DASHBOARD["annotations"]["list"]]
    return panels + marks


def labels_in(legend: str) -> tuple[str, ...]:
    return tuple(re.findall(r"{{(\w+)}}", legend))


def filled_in(expr: str) -> str:
    for name, value in VARIABLES.items():
        expr = expr.replace(name, value)
    return expr


def metrics_in(text: str) -> set[str]:
    return set(re.findall(r"\bsluice_[a-z_]+", text))


def defined_in_code() -> set[str]:
    """What the code exposes, with the samples that Prometheus clients make of a histogram."""
    registries = (gateway_metrics().registry, controller_registry(), ShadowMetrics().registry)
    names = set()
    for family in (family for registry in registries for family in registry.collect()):
        names |= {f"{family.name}_{end}" for end in SAMPLES.get(family.type, ("",))}
    return {name.rstrip("_") for name in names}


def required_binary(name: str) -> str:
    """Missing at a desk skips the test; in CI it is a failure."""
    binary = shutil.which(name)
    if binary is None:
        message = f"{name} is not installed (Debian: apt-get install prometheus)"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    return binary


@pytest.mark.parametrize("query", dashboard_queries(), ids=lambda q: f"{q.panel}-{q.expr[:20]}")
def test_every_metric_on_the_dashboard_is_defined_in_the_code(query: Query) -> None:
    assert metrics_in(query.expr) <= defined_in_code()


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: str(rule["alert"]))
def test_every_metric_of_an_alert_is_defined_in_the_code(rule: dict[str, Any]) -> None:
    assert metrics_in(rule["expr"]) <= defined_in_code()


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: str(rule["alert"]))
def test_every_alert_says_what_to_do_and_where_to_read_on(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in ("page", "ticket")
    assert rule["annotations"]["summary"]
    assert rule["annotations"]["description"]
    path, _, anchor = rule["annotations"]["runbook_url"].partition("#")
    headings = re.findall(r"^#+ (.+)$", (ROOT / path).read_text(), flags=re.MULTILINE)
    assert anchor in {heading.lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", [ALERTS_FILE, RUNBOOK], ids=lambda path: str(path.name))
def test_commands_that_people_are_told_to_run_exist(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = set(re.findall(r"`sluice ((?:rollout|cases|route|keys) [a-z]+)", path.read_text()))
    assert told
    for command in told:
        with pytest.raises(SystemExit) as left:
            main([*command.split(), "--help"])
        assert left.value.code == 0, capsys.readouterr().err


def test_panels_do_not_overlap_and_have_their_own_ids() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    cells = [
        (x, y)
        for panel in DASHBOARD["panels"]
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24


def test_the_data_source_is_the_readers_choice() -> None:
    for panel in DASHBOARD["panels"]:
        for part in [panel, *panel.get("targets", [])]:
            if panel["type"] != "row":
                assert part["datasource"] == {"type": "prometheus", "uid": "${datasource}"}


def test_core_panels_are_on_the_dashboard() -> None:
    assert set(CORE_PANELS) <= {panel["title"] for panel in DASHBOARD["panels"]}


def test_prometheus_accepts_the_alerts() -> None:
    check = subprocess.run(
        [required_binary("promtool"), "check", "rules", str(ALERTS_FILE)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert check.returncode == 0, check.stdout + check.stderr


class Story(NamedTuple):
    """Series, in promtool's notation, at which an alert fires, and others at which it must not."""

    alert: str
    bad: dict[str, str]
    good: dict[str, str]
    at: str = "80m"


REQUESTS = 'sluice_requests_total{route="r",version="r@1",arm="candidate",code="%d"}'
STORIES = [
    Story(
        "SluiceGatewayDown",
        {'up{job="gateway",instance="a"}': "0x400"},
        {'up{job="gateway",instance="a"}': "1x400"},
    ),
    Story("SluiceNoGateway", {'up{job="other"}': "1x400"}, {'up{job="gateway"}': "1x400"}),
    Story(
        "SluiceErrorRatio",
        {REQUESTS % 200: "0+600x400", REQUESTS % 500: "0+60x400"},
        {REQUESTS % 200: "0+600x400", REQUESTS % 500: "0+6x400", REQUESTS % 429: "0+600x400"},
    ),
    Story(
        "SluiceNoReplicaUp",
        {
            'sluice_replica_up{job="gateway",engine="e",replica="0"}': "0x400",
            'sluice_replica_up{job="gateway",engine="e",replica="1"}': "0x400",
        },
        {
            'sluice_replica_up{job="gateway",engine="e",replica="0"}': "0x400",
            'sluice_replica_up{job="gateway",engine="e",replica="1"}': "1x400",
        },
    ),
    Story(
        "SluiceReplicaDown",
        {'sluice_replica_up{job="gateway",engine="e",replica="0"}': "0x400"},
        {'sluice_replica_up{job="gateway",engine="e",replica="0"}': "1x400"},
    ),
    Story(
        "SluiceFallbacksHigh",
        {REQUESTS % 200: "0+60x400", 'sluice_fallbacks_total{route="r"}': "0+6x400"},
        {REQUESTS % 200: "0+600x400", 'sluice_fallbacks_total{route="r"}': "0+6x400"},
    ),
    Story(
        "SluiceEventLoopLag",
        {'sluice_event_loop_lag_seconds{instance="a"}': "0.2x400"},
        {'sluice_event_loop_lag_seconds{instance="a"}': "0.002x400"},
    ),
    Story(
        "SluiceControllerDown",
        {
            'sluice_controller_leading{instance="a"}': "0x400",
            'sluice_controller_leading{instance="b"}': "0x400",
        },
        {
            'sluice_controller_leading{instance="a"}': "0x400",
            'sluice_controller_leading{instance="b"}': "1x400",
        },
    ),
    Story(
        "SluiceControllerErrors",
        {'sluice_controller_errors_total{loop="judge"}': "0+1x400"},
        {'sluice_controller_errors_total{loop="judge"}': "0x50 3x300"},
    ),
    Story(
        "SluiceRolledBack",
        {'sluice_controller_decisions_total{route="r",event="rolled_back"}': "_x75 1x300"},
        {
            'sluice_controller_decisions_total{route="r",event="rolled_back"}': "1x400",
            'sluice_controller_decisions_total{route="r",event="promoted"}': "_x75 1x300",
        },
    ),
    Story(
        "SluiceTrialHeld",
        {'sluice_rollout_info{route="r",stage="held",candidate="r@2"}': "1x1000"},
        {
            'sluice_rollout_info{route="r",stage="held",candidate="r@2"}': "1x500",
            'sluice_rollout_info{route="r",stage="canary",candidate="r@3"}': "1x1000",
        },
        at="13h",
    ),
    Story(
        "SluiceStoreDown",
        {'sluice_store_up{instance="a"}': "1x400", 'sluice_store_up{instance="b"}': "0x400"},
        {'sluice_store_up{instance="a"}': "1x400", 'sluice_store_up{instance="b"}': "1x400"},
    ),
    Story(
        "SluiceGatewaysDisagree",
        {
            'sluice_gateway_revision{route="r",instance="a"}': "7x400",
            'sluice_gateway_revision{route="r",instance="b"}': "6x400",
        },
        {
            'sluice_gateway_revision{route="r",instance="a"}': "7x400",
            'sluice_gateway_revision{route="r",instance="b"}': "7x400",
            'sluice_gateway_revision{route="other",instance="b"}': "3x400",
            'sluice_config_revision{route="r",instance="c"}': "7x400",
        },
    ),
    Story(
        "SluiceGateFailed",
        {
            'sluice_gate_evalue{route="r",gate="pairs",side="worse"}': "31x400",
            'sluice_gate_threshold{route="r",gate="pairs",side="worse"}': "20x400",
        },
        {
            'sluice_gate_evalue{route="r",gate="pairs",side="worse"}': "3x400",
            'sluice_gate_threshold{route="r",gate="pairs",side="worse"}': "20x400",
            'sluice_gate_evalue{route="r",gate="pairs",side="not_worse"}': "31x400",
            'sluice_gate_threshold{route="r",gate="pairs",side="not_worse"}': "20x400",
        },
    ),
    Story(
        "SluiceAdapterMissing",
        {'sluice_adapters_missing{engine="main",replica="a"}': "1x400"},
        {'sluice_adapters_missing{engine="main",replica="a"}': "1 1 0x400"},
    ),
    Story(
        "SluiceEvidenceDropped",
        {"sluice_evidence_units_dropped_total": "0+6x400"},
        {"sluice_evidence_units_dropped_total": "6x400"},
    ),
    Story(
        "SluiceRedactionDropping",
        {'sluice_captures_dropped_total{reason="redaction"}': "0+6x400"},
        {'sluice_captures_dropped_total{reason="full"}': "0+6x400"},
    ),
    Story(
        "SluiceComparingFails",
        {'sluice_shadow_step_failures_total{step="judge",reason="engine"}': "0+2x400"},
        {'sluice_shadow_step_failures_total{step="judge",reason="engine"}': "0 1 2 3x400"},
    ),
    Story(
        "SluiceConfigurationRefused",
        {'sluice_config_reloads_total{instance="a",result="refused"}': "_x75 1x5"},
        {'sluice_config_reloads_total{instance="a",result="applied"}': "0x75 1x5"},
    ),
    Story(
        "SluiceDiscoveryFails",
        {'sluice_discovery_errors_total{engine="main"}': "0+12x400"},
        {'sluice_discovery_errors_total{engine="main"}': "0 0 3x400"},
    ),
    Story(
        "SluiceShadowDropping",
        {
            'sluice_shadow_dropped_total{reason="busy"}': "0+60x400",
            'sluice_shadow_pairs_total{route="r",agreement="agree"}': "0+6x400",
        },
        {
            'sluice_shadow_dropped_total{reason="busy"}': "0+6x400",
            'sluice_shadow_dropped_total{reason="no_trial"}': "0+600x400",
            'sluice_shadow_pairs_total{route="r",agreement="agree"}': "0+60x400",
        },
    ),
    Story(
        "SluiceCasesTooOld",
        {'sluice_case_oldest_seconds{route="r"}': "500000x400"},
        {'sluice_case_oldest_seconds{route="r"}': "5000x400"},
    ),
    Story(
        "SluiceTrainingFailed",
        {'sluice_training_runs{state="failed"}': "0x50 1x30"},
        {
            'sluice_training_runs{state="failed"}': "1x400",
            'sluice_training_runs{state="queued"}': "0 1x300",
        },
    ),
    Story(
        "SluiceRetrainingFails",
        {'sluice_retraining_failures{route="r"}': "3x400"},
        {'sluice_retraining_failures{route="r"}': "2x400"},
    ),
]


def test_every_alert_has_a_story() -> None:
    assert {story.alert for story in STORIES} == {rule["alert"] for rule in RULES}


def test_alerts_fire_when_they_should_and_only_then(tmp_path: Path) -> None:
    def told(story: Story, series: dict[str, str], *, fires: bool) -> dict[str, Any]:
        return {
            "interval": "1m",
            "name": f"{story.alert} {'fires' if fires else 'is quiet'}",
            "input_series": [{"series": k, "values": v} for k, v in series.items()],
            "promql_expr_test": [
                {
                    "expr": f'count(ALERTS{{alertname="{story.alert}",alertstate="firing"}}) > 0',
                    "eval_time": story.at,
                    "exp_samples": [{"labels": "{}", "value": 1}] if fires else [],
                }
            ],
        }

    tests = [told(story, story.bad, fires=True) for story in STORIES]
    tests += [told(story, story.good, fires=False) for story in STORIES]
    told_file = tmp_path / "stories.yml"
    told_file.write_text(
        yaml.safe_dump(
            {"rule_files": [str(ALERTS_FILE)], "evaluation_interval": "1m", "tests": tests}
        )
    )
    run = subprocess.run(
        [required_binary("promtool"), "test", "rules", str(told_file)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stdout + run.stderr


@dataclass(frozen=True, slots=True)
class Watched:
    """A Sluice to scrape. `work` has it answer a request."""

    gateway_url: str
    control_url: str
    work: Callable[[], None]


@dataclass(frozen=True, slots=True)
class Prometheus:
    url: str

    def query(self, expr: str) -> list[dict[str, Any]]:
        """The result of an instant query; raises AssertionError where Prometheus refuses it."""
        answer = httpx2.get(f"{self.url}/api/v1/query", params={"query": expr}, timeout=10).json()
        assert answer["status"] == "success", f"{expr}: {answer.get('error')}"
        result = answer["data"]["result"]
        assert isinstance(result, list)
        return result

    def rule_health(self) -> dict[str, str]:
        """How the last evaluation of each rule went: ok, err or unknown."""
        answer = httpx2.get(f"{self.url}/api/v1/rules", timeout=10).json()
        return {
            rule["name"]: rule["health"]
            for group in answer["data"]["groups"]
            for rule in group["rules"]
        }


@contextmanager
def prometheus(folder: Path, targets: dict[str, str]) -> Iterator[Prometheus]:
    """A real Prometheus that scrapes each job's URL every second."""
    binary = required_binary("prometheus")
    config = {
        "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(ALERTS_FILE)],
        "scrape_configs": [
            {"job_name": job, "static_configs": [{"targets": [httpx2.URL(url).netloc.decode()]}]}
            for job, url in targets.items()
        ],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with (folder / "prometheus.log").open("w") as log:
        process = subprocess.Popen(
            [
                binary,
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=log,
            stderr=log,
        )
        try:
            eventually(lambda: is_ready(process, folder, url), what="the start of Prometheus")
            yield Prometheus(url)
        finally:
            process.terminate()
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(timeout=20)


def is_ready(process: subprocess.Popen[bytes], folder: Path, url: str) -> bool:
    assert process.poll() is None, (folder / "prometheus.log").read_text()[-2000:]
    try:
        return httpx2.get(f"{url}/-/ready", timeout=2).status_code == 200
    except httpx2.TransportError:
        return False


NOW = datetime(2026, 1, 1, tzinfo=UTC)
ROUTE = "review-triage"
STABLE, CANDIDATE = f"{ROUTE}@1", f"{ROUTE}@2"


def catalog() -> Catalog:
    """One route with a canary."""
    trial = Trial(f"{CANDIDATE}.2", 2, "canary", 10.0, started_at=NOW, stage_since=NOW)
    versions = [Version(ROUTE, number, "main", "base", created_at=NOW) for number in (1, 2)]
    return Catalog(
        revision=5,
        routes={ROUTE: Route(ROUTE, "main")},
        rollouts={ROUTE: Rollout(ROUTE, revision=3, stable=1, trial=trial)},
        versions={version.name: version for version in versions},
        residency={"http://replica": Residency("main", "http://replica", ready=True)},
    )


def gateway_metrics() -> Metrics:
    metrics = Metrics()
    engine = Engine("main", ("http://replica",), "base")
    metrics.serves(index(catalog(), {engine.name: engine}))
    metrics.replica_up("main", "http://replica", up=True)
    metrics.store_up.set(1)
    metrics.lag.set(0.001)
    return metrics


def controller_registry() -> CollectorRegistry:
    registry = CollectorRegistry()
    metrics = ControllerMetrics(registry)
    metrics.show_store(up=True)
    metrics.show_leading(leading=True)
    evidence = Evidence(ROUTE, f"{CANDIDATE}.2", pairs=PairCounts(agree=9, disagree=1, losses=1))
    metrics.show(
        Seen(
            at=NOW,
            catalog=catalog(),
            verdicts={ROUTE: judge(evidence, Policy())},
            evidence={ROUTE: evidence},
            cases={ROUTE: CaseCounts({"open": 1, "leased": 0, "labelled": 0}, oldest_at=NOW)},
            progress={
                "run-1": RunEvent("training", "", NOW, 1, 2, values={"loss": 1, "tokens": 9})
            },
        )
    )
    return registry


@pytest.fixture
def stand_in() -> Iterator[Watched]:
    """The metrics of a gateway and a controller without the two, on ports of their own."""
    gateway = gateway_metrics()

    def work() -> None:
        bound = gateway.bound(ROUTE, STABLE, "stable")
        gateway.answered(bound, ROUTE, catalog().versions[STABLE], "stable", 200)
        for timing in (bound.duration, bound.first_token, bound.inter_token, gateway.overhead):
            timing.observe(0.01)
        gateway.flush()

    with ExitStack() as stack:
        urls = []
        for registry in (gateway.registry, controller_registry()):
            server, thread = start_http_server(0, addr="127.0.0.1", registry=registry)
            stack.callback(thread.join, 10)
            stack.callback(server.server_close)
            stack.callback(server.shutdown)
            urls.append(f"http://127.0.0.1:{server.server_port}")
        yield Watched(urls[0], urls[1], work)


@pytest.mark.slow
def test_a_real_prometheus_evaluates_the_dashboard(stand_in: Watched, tmp_path: Path) -> None:
    evaluate(stand_in, tmp_path)


@pytest.mark.vllm
def test_the_dashboard_shows_a_running_sluice(
    running_sluice: RunningSluice, tmp_path: Path
) -> None:
    def work() -> None:
        answer = httpx2.post(
            f"{running_sluice.gateway_url}/v1/chat/completions",
            headers={"authorization": f"Bearer {running_sluice.key}"},
            json={
                "model": ROUTE,
                "messages": [{"role": "user", "content": "Is it good?"}],
                "max_tokens": 2,
                "stream": True,
            },
            timeout=60,
        )
        assert answer.status_code == 200, answer.text

    evaluate(Watched(running_sluice.gateway_url, running_sluice.control_url, work), tmp_path)


def evaluate(watched: Watched, folder: Path) -> None:
    """Put every query of the dashboard, and every alert, to a Prometheus that scrapes it."""
    targets = {"gateway": watched.gateway_url, "controller": watched.control_url}
    with prometheus(folder, targets) as server:

        def scraped_often_enough_for_a_rate() -> bool:
            watched.work()
            good = server.query("sum_over_time(up[1m]) >= 4")
            return {series["metric"]["job"] for series in good} == targets.keys()

        eventually(scraped_often_enough_for_a_rate, what="scraping both ports")
        results: dict[str, int] = {}
        for query in dashboard_queries():
            expr = filled_in(query.expr)
            assert "$" not in expr, f"{query.panel} uses a variable that nobody fills in"
            series = server.query(expr)
            for each in series:
                assert each["metric"].keys() >= set(query.labels), f"{query.panel}: {each}"
            results[query.panel] = results.get(query.panel, 0) + len(series)
        assert not [panel for panel in CORE_PANELS if not results[panel]]
        assert server.rule_health() == {rule["alert"]: "ok" for rule in RULES}
