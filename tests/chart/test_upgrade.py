"""What `helm install` and `helm upgrade` do: keys survive. The cluster is a store that speaks the Kubernetes API."""

from __future__ import annotations

import base64
import json
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml

from tests.chart import charts

pytestmark = pytest.mark.chart

#: The kinds that the chart's own values need, by API group.
KINDS = {
    "v1": {"configmaps": "ConfigMap", "secrets": "Secret", "serviceaccounts": "ServiceAccount"},
    "networking.k8s.io/v1": {"networkpolicies": "NetworkPolicy"},
    "ray.io/v1": {"rayservices": "RayService"},
}
MISSING = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound", "code": 404}


class Cluster:
    """Keeps what is written under its path; no controller does anything with it."""

    def __init__(self, folder: Path) -> None:
        self.objects: dict[str, dict[str, Any]] = {}
        self.kubeconfig = folder / "kubeconfig"

    def discovery(self, path: str) -> dict[str, Any] | None:
        if path == "/version":
            return {"major": "1", "minor": charts.KUBERNETES.partition(".")[2], "gitVersion": f"v{charts.KUBERNETES}.0"}
        if path == "/api":
            return {"kind": "APIVersions", "versions": ["v1"]}
        if path == "/apis":
            versions = [{"groupVersion": group, "version": "v1"} for group in KINDS if "/" in group]
            groups = [{"name": v["groupVersion"][:-3], "versions": [v], "preferredVersion": v} for v in versions]
            return {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}
        group = path.removeprefix("/apis/").removeprefix("/api/")
        if group in KINDS:
            verbs = ["create", "get", "list", "patch", "update"]
            kinds = [{"name": n, "kind": k, "namespaced": True, "verbs": verbs} for n, k in KINDS[group].items()]
            return {"kind": "APIResourceList", "groupVersion": group, "resources": kinds}
        return None

    def get(self, path: str, query: str) -> dict[str, Any] | None:
        if path.rpartition("/")[2] in {name for kinds in KINDS.values() for name in kinds}:
            wanted = dict(pair.split("=") for pair in parse_qs(query).get("labelSelector", [""])[0].split(",") if pair)
            held = [o for at, o in self.objects.items() if at.rpartition("/")[0] == path]
            held = [o for o in held if wanted.items() <= o["metadata"].get("labels", {}).items()]
            return {"kind": "List", "apiVersion": "v1", "items": held}
        return self.objects.get(path) or self.discovery(path)

    def write(self, method: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
        if method == "POST":
            path = f"{path}/{body['metadata']['name']}"
        self.objects[path] = merged(self.objects[path], body) if method == "PATCH" else body
        return self.objects[path]

    def delete(self, path: str) -> dict[str, Any] | None:
        return self.objects.pop(path, None)

    def secret(self, name: str) -> dict[str, str] | None:
        found = self.objects.get(f"/api/v1/namespaces/research/secrets/{name}")
        return None if found is None else found["data"]

    def helm(self, *arguments: str) -> str:
        """Run helm against this cluster."""
        command = [str(charts.HELM), *arguments, "--kubeconfig", str(self.kubeconfig), "--namespace", "research"]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env={"HOME": str(self.kubeconfig.parent), "NO_PROXY": "127.0.0.1"},
        )
        assert done.returncode == 0, done.stderr + done.stdout
        return done.stdout

    def deploy(self, *flags: str) -> str:
        return self.helm("upgrade", "--install", "patchbay", str(charts.CHART), "--disable-openapi-validation", *flags)


def merged(old: Any, patch: Any) -> Any:
    """A JSON merge patch."""
    if not isinstance(old, dict) or not isinstance(patch, dict):
        return patch
    out = {**old, **{key: merged(old.get(key), value) for key, value in patch.items()}}
    return {key: value for key, value in out.items() if value is not None}


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """A running store and the kubeconfig that leads to it."""
    store = Cluster(tmp_path)

    class Handler(BaseHTTPRequestHandler):
        def handle_one(self) -> None:
            url = urlsplit(self.path)
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.command == "GET":
                found = store.get(url.path, url.query)
            elif self.command == "DELETE":
                found = store.delete(url.path)
            else:
                found = store.write(self.command, url.path, json.loads(body))
            text = json.dumps(found or MISSING).encode()
            self.send_response(200 if found else 404)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = handle_one  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    access = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{server.server_address[1]}"}}],
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        "users": [{"name": "u", "user": {}}],
        "current-context": "c",
    }
    store.kubeconfig.write_text(yaml.safe_dump(access), encoding="utf-8")
    store.kubeconfig.chmod(0o600)
    yield store
    server.shutdown()
    server.server_close()
    thread.join()


def test_keys_survive_upgrades(cluster: Cluster) -> None:
    """An upgrade, with other values too, leaves both Secrets as they are, accounts added by hand included."""
    assert "secret patchbay-first-key" in cluster.deploy()
    plain, digests = cluster.secret("patchbay-first-key"), cluster.secret("patchbay-keys")
    assert plain is not None
    assert digests is not None
    file = json.loads(base64.b64decode(digests["keys.json"]))
    file["keys"].append({"id": "1", "account": "alice", "sha256": "0" * 64, "created": "2026-01-01T00:00:00+00:00"})
    digests["keys.json"] = by_hand = base64.b64encode(json.dumps(file).encode()).decode()
    cluster.deploy()
    cluster.deploy("--set", "config.limits.max_rows=7")
    assert cluster.secret("patchbay-keys") == {"keys.json": by_hand}
    assert cluster.secret("patchbay-first-key") == plain
    (service,) = [o for o in cluster.objects.values() if o["kind"] == "RayService"]
    (config,) = [o for o in cluster.objects.values() if o["kind"] == "ConfigMap"]
    assert "max_rows: 7" in config["data"]["patchbay.yaml"]
    assert service["metadata"]["name"] == "patchbay"


def test_deleted_first_key_stays_deleted(cluster: Cluster) -> None:
    """Once the plain key's Secret has been deleted, an upgrade brings neither it back nor a new key."""
    cluster.deploy()
    digests = cluster.secret("patchbay-keys")
    assert cluster.delete("/api/v1/namespaces/research/secrets/patchbay-first-key") is not None
    cluster.deploy()
    assert cluster.secret("patchbay-first-key") is None
    assert cluster.secret("patchbay-keys") == digests
