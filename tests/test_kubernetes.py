"""The manifests, held against Kubernetes' schemas, the Dockerfile, the settings and the metrics. No cluster is needed.

Overlays are put together as `kubectl kustomize` does it, from what ours use: resources, and JSON patches by target.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonpatch
import kubernetes_validate
import pytest
import yaml
from support.pages import blocks

from docs.tables import rules
from server.metrics.table import METRICS
from server.settings.server import Settings

FOLDER = Path(__file__).parent.parent / "deploy" / "kubernetes"
DOCKERFILE = (FOLDER.parent.parent / "Dockerfile").read_text()
KUBERNETES = "1.37"
OVERLAYS = ("base", "replicas", "monitoring", "volumes", "weights")
FOREIGN = ("PrometheusRule", "ServiceMonitor")  # kinds that are not Kubernetes' own
NAME = {"app.kubernetes.io/name": "srpo"}


def build(overlay: Path) -> list[dict[str, Any]]:
    """The resources of an overlay."""
    kustomization = yaml.safe_load((overlay / "kustomization.yaml").read_text())
    assert set(kustomization) <= {"apiVersion", "kind", "resources", "patches"}  # what this understands
    resources: list[dict[str, Any]] = []
    for name in kustomization["resources"]:
        path = (overlay / name).resolve()
        resources += build(path) if path.is_dir() else [*yaml.safe_load_all(path.read_text())]
    for patch in kustomization.get("patches", ()):
        target = patch["target"]
        (index,) = (
            number
            for number, resource in enumerate(resources)
            if (resource["kind"], resource["metadata"]["name"]) == (target["kind"], target["name"])
        )
        resources[index] = jsonpatch.apply_patch(resources[index], yaml.safe_load(patch["patch"]))
    return resources


def find(overlay: str, kind: str) -> dict[str, Any]:
    (resource,) = (resource for resource in build(FOLDER / overlay) if resource["kind"] == kind)
    return resource


def list_all() -> Iterator[Any]:
    """Each resource of the overlays once: they have most in common."""
    seen: list[dict[str, Any]] = []
    for overlay in OVERLAYS:
        for resource in build(FOLDER / overlay):
            if resource in seen:
                continue
            seen.append(resource)
            yield pytest.param(resource, id=f"{overlay} {resource['kind']} {resource['metadata']['name']}")


def from_image(name: str) -> str:
    """A variable that the image sets."""
    (value,) = re.findall(rf"^\s*(?:ENV )?{name}=(\S+)", DOCKERFILE, re.MULTILINE)
    return str(value)


@pytest.mark.parametrize("resource", [*list_all()])
def test_every_resource_is_what_kubernetes_expects(resource: dict[str, Any]) -> None:
    """Strictly: an unknown field is an error."""
    if resource["kind"] not in FOREIGN:
        kubernetes_validate.validate(resource, KUBERNETES, strict=True)


def test_every_file_is_used() -> None:
    used = {path for overlay in OVERLAYS for path in (FOLDER / overlay).iterdir()}
    listed = {
        (FOLDER / overlay / name).resolve()
        for overlay in OVERLAYS
        for name in yaml.safe_load((FOLDER / overlay / "kustomization.yaml").read_text())["resources"]
    }
    assert {path for path in used if path.name != "kustomization.yaml"} == {path for path in listed if path.is_file()}


@pytest.mark.parametrize("overlay", ["base", "replicas"])
def test_the_pod_agrees_with_the_image(overlay: str) -> None:
    pod = find(overlay, "Deployment")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    (user, group), security = re.findall(r"^USER (\d+):(\d+)$", DOCKERFILE, re.MULTILINE)[0], pod["securityContext"]
    assert (security["runAsUser"], security["runAsGroup"], security["fsGroup"]) == (int(user), int(group), int(group))
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports["http"] == int(from_image("SRPO_PORT"))
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    assert mounts[from_image("SRPO_MODELS_DIR")]["readOnly"]
    assert {from_image("SRPO_DATA_DIR"), from_image("HOME"), "/tmp"} <= set(mounts)  # all that is written
    assert container["securityContext"]["readOnlyRootFilesystem"]
    assert {mount["name"] for mount in mounts.values()} == {volume["name"] for volume in pod["volumes"]}
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert pod["enableServiceLinks"] is False  # or a service of this name sets SRPO_PORT to an address


@pytest.mark.parametrize("overlay", ["base", "replicas"])
def test_the_pod_agrees_with_the_server(overlay: str) -> None:
    pod = find(overlay, "Deployment")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    paths = [container[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "readiness", "liveness")]
    assert paths == ["/ready", "/ready", "/health"]
    slept = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] >= Settings.model_fields["shutdown_grace"].default + slept + 10
    config = find(overlay, "ConfigMap")["data"]
    named = {name.removeprefix("SRPO_").lower() for name in config if name != "AWS_REGION"}
    assert named <= set(Settings.model_fields)
    secrets = {"SRPO_API_KEYS": "your-secret-key"}
    if overlay == "replicas":
        secrets["SRPO_DATABASE_URL"] = "postgresql://srpo:secret@postgres/srpo"
    known = {name.removeprefix("SRPO_").lower(): value for name, value in (config | secrets).items()}
    settings = Settings(host=from_image("SRPO_HOST"), **known)
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert settings.metrics_port == ports["metrics"]
    assert (settings.store_url is not None) == (overlay == "replicas")


@pytest.mark.parametrize("overlay", ["base", "replicas"])
def test_names_and_ports_lead_somewhere(overlay: str) -> None:
    resources = build(FOLDER / overlay)
    deployment = find(overlay, "Deployment")
    ports = {port["name"] for port in deployment["spec"]["template"]["spec"]["containers"][0]["ports"]}
    assert deployment["spec"]["template"]["metadata"]["labels"] == NAME
    assert {port["targetPort"] for port in find(overlay, "Service")["spec"]["ports"]} == ports
    for resource in resources:
        spec = resource.get("spec", {})
        selector = spec.get("selector") or spec.get("podSelector")
        if selector:
            assert selector.get("matchLabels", selector) == NAME, resource["kind"]
    claims = {resource["metadata"]["name"] for resource in resources if resource["kind"] == "PersistentVolumeClaim"}
    volumes = deployment["spec"]["template"]["spec"]["volumes"]
    used = {volume["persistentVolumeClaim"]["claimName"] for volume in volumes if "persistentVolumeClaim" in volume}
    assert used <= claims
    for rule in find(overlay, "NetworkPolicy")["spec"]["ingress"]:
        assert {port["port"] for port in rule["ports"]} <= ports


def test_the_weights_are_pulled_into_the_servers_volume_by_the_servers_image() -> None:
    """So that the `images:` of an overlay names both."""
    job = find("weights", "Job")["spec"]["template"]["spec"]
    server = find("base", "Deployment")["spec"]["template"]["spec"]
    assert job["containers"][0]["image"] == server["containers"][0]["image"]
    assert job["securityContext"].items() <= server["securityContext"].items()
    (models,) = (one for one in job["volumes"] if one["name"] == "models")
    assert models in server["volumes"]
    mounts = {mount["mountPath"]: mount for mount in job["containers"][0]["volumeMounts"]}
    assert {from_image("SRPO_MODELS_DIR"), from_image("HOME"), "/tmp"} <= set(mounts)
    assert not any(mount.get("readOnly") for mount in mounts.values())


def test_servers_that_share_a_database_keep_nothing_else_in_common() -> None:
    deployment = find("replicas", "Deployment")
    (data,) = (one for one in deployment["spec"]["template"]["spec"]["volumes"] if one["name"] == "data")
    assert "emptyDir" in data
    assert "replicas" not in deployment["spec"]  # the autoscaler's
    assert deployment["spec"]["strategy"]["type"] == "RollingUpdate"
    assert find("base", "Deployment")["spec"]["strategy"]["type"] == "Recreate"  # its database has one server


def test_the_operators_alerts_are_prometheus_own() -> None:
    alerts = yaml.safe_load((FOLDER.parent / "prometheus" / "alerts.yml").read_text())
    assert find("monitoring", "PrometheusRule")["spec"] == alerts
    assert (FOLDER / "monitoring" / "rules.yaml").read_text() == rules()


def shown(kind: str) -> list[dict[str, Any]]:
    """What the page shows of a kind of resource; an overlay is a Kustomization though it does not say so."""
    found = [yaml.safe_load(block.text) for block in blocks("docs/kubernetes.md", "yaml")]
    return [one for one in found if one.get("kind", "Kustomization") == kind]


def test_the_overlay_of_the_page_names_the_image_and_the_address() -> None:
    (overlay,) = (one for one in shown("Kustomization") if "resources" in one)
    assert (FOLDER / "my-server" / overlay["resources"][0]).resolve() == FOLDER / "base"
    assert [image["name"] for image in overlay["images"]] == ["srpo"]
    (patch,) = overlay["patches"]
    config = jsonpatch.apply_patch(find("base", patch["target"]["kind"]), yaml.safe_load(patch["patch"]))
    assert config["data"]["SRPO_PUBLIC_URL"] == "https://your-host.example"


def test_the_ingress_of_the_page_leads_to_the_service_and_waits_long_enough() -> None:
    (ingress,) = shown("Ingress")
    kubernetes_validate.validate(ingress, KUBERNETES, strict=True)
    (path,) = ingress["spec"]["rules"][0]["http"]["paths"]
    service = find("base", "Service")
    assert path["backend"]["service"]["name"] == service["metadata"]["name"]
    assert path["backend"]["service"]["port"]["name"] in {port["name"] for port in service["spec"]["ports"]}
    told = {name.rpartition("/")[2]: value for name, value in ingress["metadata"]["annotations"].items()}
    assert int(told["proxy-read-timeout"]) > Settings.model_fields["request_timeout"].default
    assert int(told["proxy-body-size"].removesuffix("m")) * 2**20 > Settings.model_fields["max_upload"].default
    assert told["proxy-buffering"] == "off"


def test_what_is_scaled_and_scraped_exists() -> None:
    names = {metric.name for metric in METRICS}
    scaler = find("replicas", "HorizontalPodAutoscaler")["spec"]
    assert 1 < scaler["minReplicas"] < scaler["maxReplicas"]
    (metric,) = scaler["metrics"]
    assert metric["pods"]["metric"]["name"] in names
    (endpoint,) = find("monitoring", "ServiceMonitor")["spec"]["endpoints"]
    assert endpoint["port"] in {port["name"] for port in find("base", "Service")["spec"]["ports"]}
    assert (
        find("monitoring", "ServiceMonitor")["spec"]["selector"]["matchLabels"].items()
        <= find("base", "Service")["metadata"]["labels"].items()
    )
