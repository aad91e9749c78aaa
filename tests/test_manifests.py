"""What is deployed fits together: the images, the Kubernetes objects and the contract's names."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import kubernetes_validate
import pytest
import yaml

from gateway.settings import GatewaySettings
from gateway.shadow.settings import ShadowSettings
from rollout.settings import check_section, load_settings
from trainer.settings import TrainerSettings, gateway_address, model_path

ROOT = Path(__file__).parent.parent
BASE = ROOT / "k8s" / "base"
COMPONENTS = ROOT / "k8s" / "components"

# Oldest and newest release of Kubernetes that we say we run on; the `sleep` of preStop needs 1.30.
KUBERNETES_VERSIONS = ("1.30", "1.37")
PORTS = {"gateway": 8000, "controller": 8001}
ROLES = ("gateway", "controller", "shadow", "trainer")


def read_all(path: Path) -> list[dict[str, Any]]:
    return [manifest for manifest in yaml.safe_load_all(path.read_text()) if manifest]


def base_manifests() -> list[dict[str, Any]]:
    listed = yaml.safe_load((BASE / "kustomization.yaml").read_text())["resources"]
    return [manifest for name in listed for manifest in read_all(BASE / name)]


MANIFESTS = base_manifests()
WORKLOADS = [m for m in MANIFESTS if m["kind"] in ("Deployment", "StatefulSet")]


def name_of(manifest: dict[str, Any]) -> str:
    return f"{manifest['kind']}-{manifest['metadata']['name']}"


def find(kind: str, name: str) -> dict[str, Any]:
    (found,) = [m for m in MANIFESTS if m["kind"] == kind and m["metadata"]["name"] == name]
    return found


def pod_of(workload: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = workload["spec"]["template"]["spec"]
    return spec


def container_of(workload: dict[str, Any]) -> dict[str, Any]:
    (container,) = pod_of(workload)["containers"]
    assert isinstance(container, dict)
    return container


def probes_of(container: dict[str, Any]) -> dict[str, tuple[str, Any]]:
    """The path and port of each HTTP probe."""
    return {
        kind: (container[kind]["httpGet"]["path"], container[kind]["httpGet"]["port"])
        for kind in ("startupProbe", "readinessProbe", "livenessProbe")
        if "httpGet" in container.get(kind, {})
    }


@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
@pytest.mark.parametrize("manifest", MANIFESTS, ids=name_of)
def test_every_manifest_fits_the_kubernetes_schema(manifest: dict[str, Any], version: str) -> None:
    kubernetes_validate.validate(manifest, version, strict=True)


def test_every_file_of_the_base_is_listed() -> None:
    listed = yaml.safe_load((BASE / "kustomization.yaml").read_text())
    named = set(listed["resources"])
    for generator in listed["configMapGenerator"]:
        named.update(generator["files"])
    assert named == {path.name for path in BASE.iterdir()} - {"kustomization.yaml"}


@pytest.mark.parametrize("component", sorted(path.name for path in COMPONENTS.iterdir()))
def test_the_base_renders_with_each_component(component: str, tmp_path: Path) -> None:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed; it renders the manifests as kustomize does")
    overlay = {
        "resources": [os.path.relpath(BASE, tmp_path)],
        "components": [os.path.relpath(COMPONENTS / component, tmp_path)],
    }
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(overlay))
    rendered = subprocess.run(
        [kubectl, "kustomize", str(tmp_path)], capture_output=True, text=True, timeout=60
    )
    if "unknown field" in rendered.stderr and "components" in rendered.stderr:
        pytest.skip("this kubectl is older than kustomize components (1.21)")
    assert rendered.returncode == 0, rendered.stderr
    for manifest in yaml.safe_load_all(rendered.stdout):
        if "monitoring.coreos.com" not in manifest["apiVersion"]:
            kubernetes_validate.validate(manifest, KUBERNETES_VERSIONS[-1], strict=True)


def test_the_configuration_parses_and_agrees_with_the_ports() -> None:
    config = tomllib.loads((BASE / "sluice.toml").read_text())
    for role, port in PORTS.items():
        assert config[role]["port"] == port
        assert config[role]["host"] == "0.0.0.0"
    engines = {engine["name"] for engine in config["engines"]}
    assert {route["engine"] for route in config["routes"]} <= engines


def test_the_configuration_is_one_that_sluice_accepts() -> None:
    settings = load_settings(BASE / "sluice.toml", {"SLUICE_STORE__URL": "redis://store:6379/0"})
    assert settings.store_url == "redis://store:6379/0"
    assert settings.artifacts_url.removeprefix("file://") in {
        mount["mountPath"] for mount in container_of(find("StatefulSet", "engine"))["volumeMounts"]
    }


@pytest.mark.parametrize(("role", "port"), PORTS.items())
def test_ports_and_probes_are_the_contracts(role: str, port: int) -> None:
    container = container_of(find("Deployment", role))
    assert [p["containerPort"] for p in container["ports"]] == [port]
    assert [p["port"] for p in find("Service", role)["spec"]["ports"]] == [port]
    assert probes_of(container)["readinessProbe"] == ("/readyz", "http")
    assert probes_of(container)["livenessProbe"] == ("/healthz", "http")


@pytest.mark.parametrize("role", ROLES)
def test_each_role_is_started_by_its_command(role: str) -> None:
    container = container_of(find("Deployment", role))
    assert container["args"] == [role, "--config", "/etc/sluice/sluice.toml"]
    assert container["image"] == ("sluice-trainer" if role == "trainer" else "sluice-gateway")


def test_the_engines_are_those_of_the_configuration() -> None:
    config = tomllib.loads((BASE / "sluice.toml").read_text())
    (engine,) = config["engines"]
    pods = find("StatefulSet", "engine")
    (port,) = container_of(pods)["ports"]
    assert engine["urls"] == [
        f"http://engine-{i}.{pods['spec']['serviceName']}:{port['containerPort']}"
        for i in range(pods["spec"]["replicas"])
    ]
    assert {
        f"--served-model-name={engine['base']}",
        f"--max-loras={engine['max_adapters']}",
        f"--max-lora-rank={engine['max_rank']}",
    } <= set(container_of(pods)["args"])


def test_streams_may_finish_before_a_gateway_is_killed() -> None:
    settings = load_settings(BASE / "sluice.toml", {})
    gateway = check_section(GatewaySettings, settings.gateway, "gateway")
    workload = find("Deployment", "gateway")
    wait = container_of(workload)["lifecycle"]["preStop"]["sleep"]["seconds"]
    grace = pod_of(workload)["terminationGracePeriodSeconds"]
    assert grace > wait + gateway.notice_seconds + gateway.drain_seconds


def test_requests_may_finish_before_an_engine_is_killed() -> None:
    workload = find("StatefulSet", "engine")
    (wait,) = [
        int(arg.partition("=")[2])
        for arg in container_of(workload)["args"]
        if arg.startswith("--shutdown-timeout=")
    ]
    assert pod_of(workload)["terminationGracePeriodSeconds"] > wait


def test_the_trainer_starts_from_the_very_base_that_is_served() -> None:
    settings = load_settings(BASE / "sluice.toml", {})
    trainer = check_section(TrainerSettings, settings.trainer, "trainer")
    (base,) = pod_of(find("Deployment", "trainer"))["initContainers"]
    repository, revision, folder = base["command"][2:]
    assert {repository, revision} <= set(container_of(find("StatefulSet", "engine"))["args"])
    assert folder == f"--local-dir={model_path(settings, trainer, settings.engines[0].base)}"
    assert gateway_address(settings, trainer) == f"http://gateway:{PORTS['gateway']}"


def test_the_shadow_is_seen_and_stays_behind_live_requests() -> None:
    settings = load_settings(BASE / "sluice.toml", {})
    shadow = check_section(ShadowSettings, settings.shadow, "shadow")
    (port,) = container_of(find("Deployment", "shadow"))["ports"]
    assert port["containerPort"] == shadow.metrics_port
    assert shadow.priority is not None
    assert shadow.priority > 0
    assert "--scheduling-policy=priority" in container_of(find("StatefulSet", "engine"))["args"]


def test_the_number_of_gateways_belongs_to_the_autoscaler() -> None:
    assert "replicas" not in find("Deployment", "gateway")["spec"]
    assert find("HorizontalPodAutoscaler", "gateway")["spec"]["minReplicas"] >= 2


@pytest.mark.parametrize("workload", WORKLOADS, ids=name_of)
def test_pods_are_restricted(workload: dict[str, Any]) -> None:
    pod = pod_of(workload)
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    assert pod["enableServiceLinks"] is False
    for container in [*pod.get("initContainers", []), *pod["containers"]]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert container["resources"]["requests"].keys() >= {"cpu", "memory"}
        assert "memory" in container["resources"]["limits"]


@pytest.mark.parametrize("workload", WORKLOADS, ids=name_of)
def test_volumes_that_are_mounted_exist(workload: dict[str, Any]) -> None:
    claims = {c["metadata"]["name"] for c in workload["spec"].get("volumeClaimTemplates", [])}
    volumes = {volume["name"]: volume for volume in pod_of(workload)["volumes"]}
    mounted = {mount["name"] for mount in container_of(workload)["volumeMounts"]}
    assert mounted == volumes.keys() | claims
    for volume in volumes.values():
        if claim := volume.get("persistentVolumeClaim"):
            assert find("PersistentVolumeClaim", claim["claimName"])


@pytest.mark.parametrize("workload", WORKLOADS, ids=name_of)
def test_selectors_find_their_pods(workload: dict[str, Any]) -> None:
    labels = workload["spec"]["template"]["metadata"]["labels"]
    assert workload["spec"]["selector"]["matchLabels"].items() <= labels.items()


def test_services_and_budgets_select_something() -> None:
    pods = [workload["spec"]["template"]["metadata"]["labels"] for workload in WORKLOADS]
    for manifest in MANIFESTS:
        if manifest["kind"] == "Service":
            wanted = manifest["spec"]["selector"]
        elif manifest["kind"] == "PodDisruptionBudget":
            wanted = manifest["spec"]["selector"]["matchLabels"]
        else:
            continue
        assert any(wanted.items() <= labels.items() for labels in pods), name_of(manifest)


def test_no_secret_is_contained() -> None:
    assert not [m for m in MANIFESTS if m["kind"] == "Secret"]
    for workload in WORKLOADS:
        for variable in container_of(workload).get("env", []):
            if re.search("KEY|PASSWORD|TOKEN|URL", variable["name"]):
                assert "secretKeyRef" in variable["valueFrom"], variable["name"]


def test_the_runbook_makes_the_secret_that_is_asked_for() -> None:
    runbook = (ROOT / "docs" / "operations.md").read_text()
    asked = {
        variable["valueFrom"]["secretKeyRef"]["key"]
        for workload in WORKLOADS
        for variable in container_of(workload).get("env", [])
        if "valueFrom" in variable
    }
    assert asked == set(re.findall(r"--from-literal=([a-z-]+)=", runbook))


def test_the_store_forgets_nothing() -> None:
    directives = [
        line.split(maxsplit=1) for line in (BASE / "valkey.conf").read_text().splitlines()
    ]
    config = {words[0]: words[1] for words in directives if len(words) == 2}
    assert config["appendonly"] == "yes"
    assert config["appendfsync"] == "always"
    assert config["maxmemory-policy"] == "noeviction"


class Instruction(NamedTuple):
    word: str
    rest: str


class Stage(NamedTuple):
    name: str
    base: str
    instructions: list[Instruction]

    def last(self, word: str) -> str | None:
        found = [i.rest for i in self.instructions if i.word == word]
        return found[-1] if found else None


def instructions(text: str) -> Iterator[Instruction]:
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        word, _, rest = line.partition(" ")
        yield Instruction(word, " ".join(rest.split()))


def stages() -> dict[str, Stage]:
    found: dict[str, Stage] = {}
    current: Stage | None = None
    for instruction in instructions((ROOT / "Dockerfile").read_text()):
        if instruction.word == "FROM":
            base, _, name = instruction.rest.partition(" AS ")
            current = found[name] = Stage(name, base, [])
        elif current is not None:
            current.instructions.append(instruction)
    return found


def lineage(name: str) -> list[Stage]:
    """The stage and the stages that it is built upon, nearest first."""
    every = stages()
    line = [every[name]]
    while line[-1].base in every:
        line.append(every[line[-1].base])
    return line


def effective(name: str, word: str) -> str:
    """What the image of a target ends up with for an instruction that is inherited."""
    return next(value for stage in lineage(name) if (value := stage.last(word)) is not None)


TARGETS = ("gateway", "trainer", "engine")


@pytest.mark.parametrize("target", TARGETS)
def test_images_do_not_run_as_root(target: str) -> None:
    user, _, group = effective(target, "USER").partition(":")
    assert int(user) > 0
    assert int(group) > 0


@pytest.mark.parametrize("target", TARGETS)
def test_images_have_health_and_labels(target: str) -> None:
    assert effective(target, "HEALTHCHECK")
    assert "org.opencontainers.image.title" in effective(target, "LABEL")
    assert json.loads(effective(target, "ENTRYPOINT"))[0] == (
        "vllm" if target == "engine" else "sluice"
    )


def test_the_default_target_is_the_gateway() -> None:
    assert list(stages())[-1] == "gateway"


def test_base_images_are_pinned() -> None:
    pins = [i.rest for i in instructions((ROOT / "Dockerfile").read_text()) if i.word == "ARG"]
    images = dict(pin.split("=", 1) for pin in pins if "_IMAGE=" in pin)
    for stage in stages().values():
        if stage.base not in stages():
            image = images[stage.base.strip("${}")]
            assert re.search(r":v?\d+\.\d+\.\d+", image), image


@pytest.mark.parametrize("stage", stages().values(), ids=lambda stage: str(stage.name))
def test_what_images_copy_exists_and_reaches_the_builder(stage: Stage) -> None:
    for copy in (i.rest for i in stage.instructions if i.word == "COPY"):
        if copy.startswith("--from="):
            assert copy.split()[0].removeprefix("--from=") in stages()
            continue
        for source in copy.split()[:-1]:
            assert (ROOT / source).exists(), source
            assert is_sent_to_builder(source), f"{source} is left out by .dockerignore"


def is_sent_to_builder(source: str) -> bool:
    sent = True
    for rule in (ROOT / ".dockerignore").read_text().splitlines():
        if rule and not rule.startswith("#") and fnmatch(source.rstrip("/"), rule.strip("!/")):
            sent = rule.startswith("!")
    return sent


def test_the_images_install_the_pinned_versions() -> None:
    installs = [
        i.rest
        for stage in stages().values()
        for i in stage.instructions
        if i.word == "RUN" and "pip install" in i.rest
    ]
    assert len(installs) == 3
    for install in installs:
        assert "-c constraints/sluice.txt" in install
        assert "index-url" not in install


def test_the_gateway_image_has_the_hot_path_compiled() -> None:
    compiling = [i.rest for i in stages()["wheel"].instructions if "SLUICE_COMPILE=1" in i.rest]
    assert len(compiling) == 1
    copied = [i.rest for i in stages()["build-gateway"].instructions if i.word == "COPY"]
    assert "--from=wheel /wheels/ /wheels/" in copied


def test_files_beside_the_code_are_in_the_wheel_and_so_in_the_images() -> None:
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    for package in ("gateway", "rollout", "trainer"):
        patterns = tool["package-data"].get(package, [])
        packed = {path for pattern in patterns for path in (ROOT / package).glob(pattern)}
        beside = {
            path
            for path in (ROOT / package).rglob("*")
            if path.is_file() and path.suffix not in (".py", ".pyc")
        }
        assert beside <= packed, f"pyproject.toml, package-data: {sorted(beside - packed)}"
