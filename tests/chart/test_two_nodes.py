"""The rendered chart on two real Ray nodes, as close to KubeRay as one machine without Kubernetes gets.

Needs root and namespaces, and half a minute: runs only where PATCHBAY_TEST_TWO_NODES is set, to 1 or to the folder of a
model that takes the embedded one's place.
"""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.chart import charts

pytestmark = [
    pytest.mark.chart,
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.skipif(
        not os.environ.get("PATCHBAY_TEST_TWO_NODES"), reason="set PATCHBAY_TEST_TWO_NODES=1 (needs root)"
    ),
]

NAMESPACES = ("unshare", "--mount", "--net", "--pid", "--fork", "--mount-proc")
CLIENT = """
import os, subprocess, patchbay as pb

print("image's health check:", subprocess.run(HEALTHCHECK).returncode)
assert os.getuid() == 10001
for host in ("10.9.0.1", "10.9.0.2"):
    with pb.connect(f"{host}:9000", api_key=KEY) as client:
        print("models", host, [summary.name for summary in client.models()])
        model = client.model("demo")
        with model.trace("The capital of France is") as run:
            h = run.blocks[0].resid_post[:, -1].save()
        print("trace", host, h.value.shape)
    try:
        pb.connect(f"{host}:9000", api_key="pbk_wrong").model("demo")
    except pb.PatchbayError as error:
        print("refused", host, type(error).__name__)
"""


def start_arguments(parameters: dict[str, str], container: charts.Manifest) -> list[str]:
    """Flags of `ray start`, as KubeRay makes them of rayStartParams and of a container's limits."""
    return [f"--{k}={v}" for k, v in ({"num-cpus": container["resources"]["limits"]["cpu"]} | parameters).items()]


@pytest.mark.timeout(420)
def test_chart_on_two_nodes(tmp_path: Path) -> None:
    """Head and worker, unprivileged on read-only roots, take the rendered configuration and answer a trace on both."""
    release = charts.render("cpu-demo")
    cluster = release.one("RayService")["spec"]["rayClusterConfig"]
    head = cluster["headGroupSpec"]
    (worker,) = cluster["workerGroupSpecs"]
    work = tmp_path / "work"
    (work / "keys").mkdir(parents=True)

    def here(text: str) -> str:
        return text.replace("/etc/patchbay", str(work))

    folder = os.environ["PATCHBAY_TEST_TWO_NODES"]
    source = folder if os.path.isdir(folder) else "demo"
    file = here(release.patchbay_yaml).replace("source: demo", f"source: {source}")
    (work / "patchbay.yaml").write_text(file, encoding="utf-8")
    (work / "serve.json").write_text(here(json.dumps(release.serve_config)), encoding="utf-8")
    secrets = {s["metadata"]["name"]: s["data"] for s in release.of_kind("Secret")}
    (work / "keys" / "keys.json").write_bytes(base64.b64decode(secrets["patchbay-keys"]["keys.json"]))
    key = base64.b64decode(secrets["patchbay-first-key"]["key"]).decode()
    check = re.search(r"HEALTHCHECK .*?CMD (\[.*?\])\n", (charts.ROOT / "deploy" / "Dockerfile").read_text(), re.DOTALL)
    assert check is not None
    client = CLIENT.replace("HEALTHCHECK", repr(json.loads(check[1]))).replace("KEY", repr(key))
    (work / "client.py").write_text(client, encoding="utf-8")
    variables = {e["name"]: e["value"] for _, c in release.containers() for e in c["env"] if "value" in e}
    # Not of the chart: where this checkout is, and one thread each, since both nodes share the machine.
    variables |= {"PYTHONPATH": f"{charts.ROOT}/client:{charts.ROOT}/server", "OMP_NUM_THREADS": "1"}
    (work / "env").write_text("\n".join(f"{k}={v}" for k, v in variables.items()), encoding="utf-8")
    for name, group in (("head", head), ("worker", worker)):
        arguments = start_arguments(group["rayStartParams"], group["template"]["spec"]["containers"][0])
        (work / f"{name}.args").write_text("\n".join(arguments), encoding="utf-8")
    for path in (tmp_path, work, work / "keys"):
        path.chmod(0o755)

    kept = dict.fromkeys(
        [str(Path(sys.prefix)), str(Path(sys.base_prefix)), str(charts.ROOT), str(work), *({source} - {"demo"})]
    )
    script = Path(__file__).with_name("two-nodes.sh")
    done = subprocess.run(
        [*NAMESPACES, "bash", str(script), str(work), str(work / "client.py"), *kept],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
        env={"PATH": os.environ["PATH"], "PODS_PATH": f"{sys.prefix}/bin:/usr/bin:/bin"},
    )
    print(done.stdout, done.stderr)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert "deploy without a token: 401" in lines
    assert "image's health check: 0" in lines
    (states,) = [line for line in lines if line.startswith("applications: ")]
    assert yaml.safe_load(states.removeprefix("applications: ")) == {"control": "RUNNING", "demo": "RUNNING"}
    for host in ("10.9.0.1", "10.9.0.2"):
        assert f"health {host} 200 success 200" in lines
        assert f"models {host} ['demo']" in lines
        assert any(line.startswith(f"trace {host} (1, ") for line in lines)
        assert f"refused {host} UnauthenticatedError" in lines
