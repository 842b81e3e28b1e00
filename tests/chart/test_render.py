"""What the chart renders: valid objects that fit each other and keep to the rules of the house."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.chart import charts
from tests.chart.charts import Manifest, Release

pytestmark = pytest.mark.chart

#: Kinds of extensions, which Kubernetes' own schemas do not know.
EXTENSIONS = {"RayService", "Gateway", "GRPCRoute", "PodMonitor"}
RAYSERVICE = json.loads(Path(__file__).with_name("rayservice.schema.json").read_text(encoding="utf-8"))


def matches(selector: dict[str, Any], template: Manifest) -> bool:
    labels = template["metadata"]["labels"]
    return selector["matchLabels"].items() <= labels.items()


@pytest.mark.parametrize("example", ["defaults", *charts.EXAMPLES])
def test_lint(example: str) -> None:
    """`helm lint --strict` finds nothing in the chart with its own values and with each example."""
    values = [] if example == "defaults" else ["--values", str(charts.CHART / "ci" / f"{example}-values.yaml")]
    assert "0 chart(s) failed" in charts.run("lint", "--strict", str(charts.CHART), *values)


def test_core_kinds_are_valid(release: Release) -> None:
    """Every object of a core kind, and every pod and Service inside the RayService, is strictly valid Kubernetes."""
    core = [m for m in release.manifests if m["kind"] not in EXTENSIONS]
    checked = [*core, release.service, *release.pods.values()]
    for manifest in checked:
        kubernetes_validate.validate(manifest, charts.KUBERNETES, strict=True)
    assert len(checked) >= 5


def test_rayservice_is_valid(release: Release) -> None:
    """The RayService uses only fields of KubeRay's definition, with the right types."""
    jsonschema.Draft7Validator(RAYSERVICE).validate(release.one("RayService"))


def test_rayservice_schema_is_closed() -> None:
    """The schema of the RayService refuses a misspelt field, so that the test above means something."""
    manifest = charts.render().one("RayService")
    manifest["spec"]["rayClusterConfig"]["headGroupSpec"]["rayStartParam"] = {}
    with pytest.raises(jsonschema.ValidationError, match="rayStartParam"):
        jsonschema.Draft7Validator(RAYSERVICE).validate(manifest)


def test_containers_are_confined(release: Release) -> None:
    """Every container states its resources and runs unprivileged, as a numeric user, on a read-only root."""
    for template in release.templates.values():
        pod = template["spec"]["securityContext"]
        assert pod["runAsNonRoot"] is True
        assert pod["runAsUser"] >= 10000
        assert pod["seccompProfile"] == {"type": "RuntimeDefault"}
        assert template["spec"]["automountServiceAccountToken"] is False
    names = []
    for name, container in release.containers():
        names.append(name)
        for part in ("requests", "limits"):
            assert {"cpu", "memory"} <= container["resources"][part].keys(), name
        context = container["securityContext"]
        assert context["readOnlyRootFilesystem"] is True, name
        assert context["allowPrivilegeEscalation"] is False, name
        assert context["capabilities"] == {"drop": ["ALL"]}, name
    assert len(names) >= 2


def test_written_folders_are_volumes(release: Release) -> None:
    """What a process may write under a read-only root is a volume: /tmp, the home, artifacts, the model cache."""
    for template in release.templates.values():
        volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
        mounts = {m["mountPath"]: m for m in template["spec"]["containers"][0]["volumeMounts"]}
        for path in ("/tmp", "/home/patchbay", "/var/cache/huggingface", "/var/lib/patchbay/artifacts"):
            volume = volumes[mounts[path]["name"]]
            assert not mounts[path].get("readOnly")
            assert "emptyDir" in volume or "persistentVolumeClaim" in volume
        assert {m["name"] for m in mounts.values()} == volumes.keys()


def test_artifacts_have_one_folder_for_all_pods(tmp_path: Path) -> None:
    """Persistent artifacts are on one claim that every pod mounts where the configuration says."""
    shared = charts.render(values={"artifacts": {"persistent": True, "size": "7Gi"}}, tmp=tmp_path)
    (claim,) = shared.of_kind("PersistentVolumeClaim")
    assert claim["spec"]["resources"]["requests"]["storage"] == "7Gi"
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for template in shared.templates.values():
        volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
        assert volumes["artifacts"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    config = yaml.safe_load(shared.one("ConfigMap")["data"]["patchbay.yaml"])
    assert config["artifacts"]["path"] == "/var/lib/patchbay/artifacts"
    with pytest.raises(charts.HelmError, match=r"artifacts\.path must stay"):
        charts.render(values={"config": {"artifacts": {"path": "/data"}}}, tmp=tmp_path)


def test_selectors_match_pods(release: Release) -> None:
    """NetworkPolicy, disruption budget and PodMonitor select the release's own pods."""
    templates = release.templates
    policy = release.one("NetworkPolicy")["spec"]
    assert all(matches(policy["podSelector"], t) for t in templates.values())
    assert all(matches(policy["ingress"][0]["from"][0]["podSelector"], t) for t in templates.values())
    for budget in release.of_kind("PodDisruptionBudget"):
        selected = {name for name, t in templates.items() if matches(budget["spec"]["selector"], t)}
        assert selected == templates.keys() - {"head"}
    for monitor in release.of_kind("PodMonitor"):
        assert all(matches(monitor["spec"]["selector"], t) for t in templates.values())
        port = monitor["spec"]["podMetricsEndpoints"][0]["port"]
        assert all(port in {p["name"] for p in c["ports"]} for _, c in release.containers())


def test_one_release_does_not_select_another() -> None:
    """Two releases in one namespace share no name and no selector."""
    first, second = charts.render(release="patchbay"), charts.render(release="other")
    names = [{(m["kind"], m["metadata"]["name"]) for m in r.manifests} for r in (first, second)]
    assert names[0].isdisjoint(names[1])
    selector = first.one("NetworkPolicy")["spec"]["podSelector"]
    assert not any(matches(selector, t) for t in second.templates.values())


def test_only_grpc_is_open(release: Release) -> None:
    """Others than the release's pods, the operator and the monitoring reach the gRPC port and no other."""
    own, clients, operator, *metrics = release.one("NetworkPolicy")["spec"]["ingress"]
    assert "ports" not in own
    assert clients["ports"] == [{"protocol": "TCP", "port": "serve-grpc"}]
    assert [p["port"] for p in operator["ports"]] == [8265]
    assert operator["from"]
    for rule in metrics:
        assert [p["port"] for p in rule["ports"]] == ["metrics"]
        assert rule["from"]


def test_service_carries_grpc_alone(release: Release) -> None:
    """The Service has one port, gRPC over HTTP/2 without TLS, that every pod has and KubeRay does not drop."""
    (port,) = release.service["spec"]["ports"]
    assert port["appProtocol"] == "kubernetes.io/h2c"
    for _, container in release.containers():
        served = {p["name"]: p["containerPort"] for p in container["ports"]}
        # KubeRay puts every container port by such a name on the Service, whatever the Service says.
        assert [name for name in served if re.fullmatch(r"serve(-.*)?", name)] == [port["name"]]
        assert port["targetPort"] in served


def test_routes_lead_to_the_service(release: Release) -> None:
    """GRPCRoute and Ingress point at the Service's name and port, and TLS is part of the way in."""
    service = release.service
    target = (service["metadata"]["name"], service["spec"]["ports"][0]["port"])
    for route in release.of_kind("GRPCRoute"):
        (backend,) = route["spec"]["rules"][0]["backendRefs"]
        assert (backend["name"], backend["port"]) == target
        assert route["spec"]["parentRefs"]
    for gateway in release.of_kind("Gateway"):
        assert all(listener["tls"]["certificateRefs"] for listener in gateway["spec"]["listeners"])
    for ingress in release.of_kind("Ingress"):
        backend = ingress["spec"]["rules"][0]["http"]["paths"][0]["backend"]["service"]
        assert (backend["name"], backend["port"]["number"]) == target
        assert ingress["spec"]["tls"][0]["secretName"]


def test_mounted_objects_exist(release: Release) -> None:
    """Every ConfigMap, Secret and claim that a pod mounts is rendered, unless the operator named one of theirs."""
    rendered = {(m["kind"], m["metadata"]["name"]) for m in release.manifests}
    named = {"patchbay-keys", "team-keys", "hub-cache", "models"}
    seen = set()
    for template in release.templates.values():
        for volume in template["spec"]["volumes"]:
            if "configMap" in volume:
                seen.add(("ConfigMap", volume["configMap"]["name"]))
            elif "secret" in volume:
                seen.add(("Secret", volume["secret"]["secretName"]))
            elif "persistentVolumeClaim" in volume:
                seen.add(("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]))
    assert {name for kind, name in seen - rendered} <= named
    assert ("ConfigMap", release.one("ConfigMap")["metadata"]["name"]) in seen


def test_secrets_stay_in_secrets(release: Release) -> None:
    """What a Secret holds, in clear or in base64, is in no other object."""
    others = json.dumps([m for m in release.manifests if m["kind"] != "Secret"])
    for secret in release.of_kind("Secret"):
        for encoded in secret["data"].values():
            plain = base64.b64decode(encoded).decode()
            assert encoded not in others
            assert plain not in others
            for word in re.findall(r"[A-Za-z0-9+/_-]{32,}", plain):
                assert word not in others


def test_plain_key_is_not_mounted() -> None:
    """The generated key itself lies in a Secret of its own that no pod refers to; pods see its digest only."""
    release = charts.render()
    plain, digests = "patchbay-first-key", "patchbay-keys"
    assert {s["metadata"]["name"] for s in release.of_kind("Secret")} == {plain, digests}
    pods = json.dumps(release.templates)
    assert digests in pods
    assert plain not in pods


def test_own_key_secret(tmp_path: Path) -> None:
    """With keys.existingSecret the chart makes no Secret and mounts the one that is named."""
    release = charts.render(values={"keys": {"existingSecret": "mine"}}, tmp=tmp_path)
    assert release.of_kind("Secret") == []
    for template in release.templates.values():
        (keys,) = [v for v in template["spec"]["volumes"] if v["name"] == "keys"]
        assert keys["secret"]["secretName"] == "mine"


def test_insecure_has_no_keys(tmp_path: Path) -> None:
    """config.insecure, which must be said, needs no Secret and mounts none."""
    release = charts.render(values={"config": {"insecure": True}}, tmp=tmp_path)
    assert release.of_kind("Secret") == []
    assert all(v["name"] != "keys" for t in release.templates.values() for v in t["spec"]["volumes"])


def test_config_change_replaces_pods_and_key_change_does_not(tmp_path: Path) -> None:
    """Pods differ when the configuration does; other keys, or a newer chart, leave them as they are."""
    base = charts.render().templates
    assert charts.render().templates == base  # although each rendering makes a new key
    changed = charts.render(values={"config": {"limits": {"max_rows": 7}}}, tmp=tmp_path).templates
    for name, template in changed.items():
        assert template["metadata"]["annotations"] != base[name]["metadata"]["annotations"]
    assert not any("helm.sh/chart" in t["metadata"]["labels"] for t in base.values())


def test_ray_token_authentication_is_on(release: Release) -> None:
    """Ray's processes demand a token of each other, from the operator's Secret where one is named."""
    options = release.one("RayService")["spec"]["rayClusterConfig"]["authOptions"]
    assert options["mode"] == "token"
    environment = {e["name"] for _, c in release.containers() for e in c["env"]}
    # KubeRay sets them; a value here would win over its Secret.
    assert not environment & {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN"}


def test_ray_token_secret() -> None:
    """rayAuth.existingSecret names the Secret that the token comes from."""
    options = charts.render("two-models").one("RayService")["spec"]["rayClusterConfig"]["authOptions"]
    assert options == {"mode": "token", "secretName": "ray-token"}


def test_gpu_example() -> None:
    """The GPU example asks Kubernetes for the card, tolerates its taint, and takes the hub's token from a Secret."""
    template = charts.render("gpu-8b").templates["gpu"]
    (container,) = template["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert template["spec"]["tolerations"][0]["key"] == "nvidia.com/gpu"
    (token,) = [e for e in container["env"] if e["name"] == "HF_TOKEN"]
    assert token["valueFrom"]["secretKeyRef"] == {"name": "hf-token", "key": "token"}


def test_long_release_names_fit(tmp_path: Path) -> None:
    """The longest release name that Helm takes still gives a name that KubeRay takes."""
    manifest = charts.render(release="r" + "x" * 52).one("RayService")
    assert len(manifest["metadata"]["name"]) <= 47
    jsonschema.Draft7Validator(RAYSERVICE).validate(manifest)
