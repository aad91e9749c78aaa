"""What ops look at exists: every metric of the dashboard and the alerts, tried on a real Prometheus."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import httpx2
import pytest
import yaml
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

ROOT = Path(__file__).parent.parent
DASHBOARD = json.loads((ROOT / "dashboards" / "sluice.json").read_text())
ALERTS_FILE = ROOT / "dashboards" / "alerts.yml"
RULES = [
    rule for group in yaml.safe_load(ALERTS_FILE.read_text())["groups"] for rule in group["rules"]
]
PACKAGES = ("gateway", "rollout", "trainer")

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


def dashboard_queries() -> list[Query]:
    panels = [
        Query(panel["title"], target["expr"])
        for panel in DASHBOARD["panels"]
        for target in panel.get("targets", [])
    ]
    marks = [Query(mark["name"], mark["expr"]) for mark in DASHBOARD["annotations"]["list"]]
    return panels + marks


def filled_in(expr: str) -> str:
    for name, value in VARIABLES.items():
        expr = expr.replace(name, value)
    return expr


def metrics_in(text: str) -> set[str]:
    return set(re.findall(r"\bsluice_[a-z_]+", text))


def family(name: str) -> str:
    """The name without what Prometheus clients and histograms append to it."""
    return re.sub(r"_(total|bucket|count|sum|created)$", "", name)


def defined_in_code() -> set[str]:
    return {
        family(name)
        for package in PACKAGES
        for source in (ROOT / package).rglob("*.py")
        for name in re.findall(r"[\"'](sluice_[a-z_]+)[\"']", source.read_text())
    }


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
    missing = {m for m in metrics_in(query.expr) if family(m) not in defined_in_code()}
    assert not missing


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: str(rule["alert"]))
def test_every_metric_of_an_alert_is_defined_in_the_code(rule: dict[str, Any]) -> None:
    missing = {m for m in metrics_in(rule["expr"]) if family(m) not in defined_in_code()}
    assert not missing


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: str(rule["alert"]))
def test_every_alert_says_what_to_do_and_where_to_read_on(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in ("page", "ticket")
    assert rule["annotations"]["summary"]
    assert rule["annotations"]["description"]
    path, _, anchor = rule["annotations"]["runbook_url"].partition("#")
    headings = re.findall(r"^#+ (.+)$", (ROOT / path).read_text(), flags=re.MULTILINE)
    assert anchor in {heading.lower().replace(" ", "-") for heading in headings}


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
            'sluice_replica_up{engine="e",replica="0"}': "0x400",
            'sluice_replica_up{engine="e",replica="1"}': "0x400",
        },
        {
            'sluice_replica_up{engine="e",replica="0"}': "0x400",
            'sluice_replica_up{engine="e",replica="1"}': "1x400",
        },
    ),
    Story(
        "SluiceReplicaDown",
        {'sluice_replica_up{engine="e",replica="0"}': "0x400"},
        {'sluice_replica_up{engine="e",replica="0"}': "1x400"},
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
        "SluiceControllerDown", {'up{job="gateway"}': "1x400"}, {'up{job="controller"}': "1x400"}
    ),
    Story(
        "SluiceStoreDown",
        {'sluice_store_up{instance="a"}': "1x400", 'sluice_store_up{instance="b"}': "0x400"},
        {'sluice_store_up{instance="a"}': "1x400", 'sluice_store_up{instance="b"}': "1x400"},
    ),
    Story(
        "SluiceGatewaysDisagree",
        {
            'sluice_gateway_revision{gateway="a"}': "7x400",
            'sluice_gateway_revision{gateway="b"}': "6x400",
        },
        {
            'sluice_gateway_revision{gateway="a"}': "7x400",
            'sluice_gateway_revision{gateway="b"}': "7x400",
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
                    "eval_time": "80m",
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


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 30) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, f"{what}: not within {seconds:.0f} s"
        time.sleep(0.1)


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
            wait_until(lambda: is_ready(process, folder, url), "Prometheus starts")
            yield Prometheus(url)
        finally:
            process.terminate()
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(timeout=20)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        assert isinstance(port, int)
        return port


def is_ready(process: subprocess.Popen[bytes], folder: Path, url: str) -> bool:
    assert process.poll() is None, (folder / "prometheus.log").read_text()[-2000:]
    try:
        return httpx2.get(f"{url}/-/ready", timeout=2).status_code == 200
    except httpx2.TransportError:
        return False


@pytest.fixture
def stand_in() -> Iterator[Watched]:
    """Two small servers that expose what the contract says of the gateway and the controller."""
    gateway, control = CollectorRegistry(), CollectorRegistry()
    seen = ["review-triage", "review-triage@1"]
    arm = ["route", "version", "arm"]
    requests = Counter("sluice_requests", "-", [*arm, "code"], registry=gateway)
    timings = [
        Histogram(f"sluice_{name}_seconds", "-", labels, registry=gateway)
        for name, labels in {
            "request_duration": arm,
            "time_to_first_token": arm,
            "inter_token": arm,
            "overhead": [],
        }.items()
    ]
    Gauge("sluice_inflight", "-", registry=gateway).set(1)
    Gauge("sluice_event_loop_lag_seconds", "-", registry=gateway).set(0.001)
    Gauge("sluice_store_up", "-", registry=gateway).set(1)
    up = Gauge("sluice_replica_up", "-", ["engine", "replica"], registry=gateway)
    up.labels("main", "0").set(1)
    Gauge("sluice_config_revision", "-", registry=control).set(3)
    Gauge("sluice_gateway_revision", "-", ["gateway"], registry=control).labels("a").set(3)
    Gauge("sluice_route_weight", "-", ["route", "version"], registry=control).labels(*seen).set(100)
    info = Gauge("sluice_rollout_info", "-", ["route", "stage"], registry=control)
    info.labels("review-triage", "canary").set(1)

    def work() -> None:
        requests.labels(*seen, "stable", "200").inc()
        for timing in timings:
            (timing.labels(*seen, "stable") if timing._labelnames else timing).observe(0.1)

    with ExitStack() as stack:
        urls = []
        for registry in (gateway, control):
            server, thread = start_http_server(0, addr="127.0.0.1", registry=registry)
            stack.callback(thread.join, 10)
            stack.callback(server.server_close)
            stack.callback(server.shutdown)
            urls.append(f"http://127.0.0.1:{server.server_port}")
        yield Watched(urls[0], urls[1], work)


@pytest.fixture
def watched(stand_in: Watched) -> Watched:
    return stand_in


@pytest.mark.slow
def test_a_real_prometheus_evaluates_the_dashboard(watched: Watched, tmp_path: Path) -> None:
    targets = {"gateway": watched.gateway_url, "controller": watched.control_url}
    with prometheus(tmp_path, targets) as server:

        def scraped_often_enough_for_a_rate() -> bool:
            watched.work()
            good = server.query("sum_over_time(up[1m]) >= 4")
            return {series["metric"]["job"] for series in good} == targets.keys()

        wait_until(scraped_often_enough_for_a_rate, "Prometheus scrapes both ports")
        results: dict[str, int] = {}
        for query in dashboard_queries():
            expr = filled_in(query.expr)
            assert "$" not in expr, f"{query.panel} uses a variable that nobody fills in"
            results[query.panel] = results.get(query.panel, 0) + len(server.query(expr))
        assert not [panel for panel in CORE_PANELS if not results[panel]]
        rules = httpx2.get(f"{server.url}/api/v1/rules", timeout=10).json()["data"]["groups"]
        states = {rule["name"]: rule["health"] for group in rules for rule in group["rules"]}
        assert set(states) == {rule["alert"] for rule in RULES}
        assert not [name for name, health in states.items() if health == "err"]
