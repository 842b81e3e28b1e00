#!/usr/bin/env bash
# Two Ray nodes as KubeRay would start them: each in a network namespace of its own, an unprivileged user, a read-only
# root with volumes for what is written, Ray's token demanded, the Serve configuration handed to the dashboard.
# Run by test_two_nodes.py as root inside `unshare --mount --net --pid --fork --mount-proc`, so that whatever it starts ends
# with it. Prints what it saw; changes nothing outside its namespaces.
#   two-nodes.sh WORKDIR CLIENT [PATH_TO_KEEP ...]
# WORKDIR: serve.json, env (NAME=VALUE lines), head.args and worker.args (flags of ray start, one per line).
# CLIENT: a Python program, run once the applications run. Kept paths stay visible under the covered /tmp and /root.
set -euo pipefail
workdir=$1 client=$2
shift 2
token=two-nodes-0123456789abcdef0123456789abcdef

mount --make-rprivate /
mount -t tmpfs tmpfs /mnt
index=0
for path in "$@"; do
  mkdir "/mnt/$index"
  mount --bind "$path" "/mnt/$index"
  index=$((index + 1))
done
mount -t tmpfs -o mode=1777 tmpfs /tmp
mount -t tmpfs -o mode=0755 tmpfs /root
index=0
for path in "$@"; do
  case "$path" in /tmp/* | /root/*)
    mkdir -p "$path"
    mount --bind "/mnt/$index" "$path"
    ;;
  esac
  index=$((index + 1))
done
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
mkdir /mnt/home /mnt/cache
chown 10001:10001 /mnt/home /mnt/cache
mount -t tmpfs -o mode=0755,uid=10001,gid=10001 tmpfs /mnt/home
mount -t tmpfs -o mode=0755,uid=10001,gid=10001 tmpfs /mnt/cache

ip link set lo up
unshare --net sleep infinity &
worker=$!
until [ "$(readlink "/proc/$worker/ns/net")" != "$(readlink /proc/self/ns/net)" ]; do :; done
in_worker() { nsenter --target "$worker" --net "$@"; }
ip link add head0 type veth peer name worker0
ip link set worker0 netns "$worker"
ip addr add 10.9.0.1/24 dev head0
ip link set head0 up
in_worker ip link set lo up
in_worker ip addr add 10.9.0.2/24 dev worker0
in_worker ip link set worker0 up

mount -o remount,bind,ro /
if touch /probe 2>/dev/null; then echo "the root is writable" >&2 && exit 1; fi

mapfile -t variables <"$workdir/env"
mapfile -t head_arguments <"$workdir/head.args"
mapfile -t worker_arguments <"$workdir/worker.args"
pod=(setpriv --reuid 10001 --regid 10001 --clear-groups --no-new-privs --bounding-set=-all env -i
  "PATH=$PODS_PATH" HOME=/mnt/home "${variables[@]}" HF_HOME=/mnt/cache PYTHONDONTWRITEBYTECODE=1
  RAY_AUTH_MODE=token "RAY_AUTH_TOKEN=$token" RAY_SERVE_KV_TIMEOUT_S=5)
cd /
"${pod[@]}" ray start --head --port=6379 --node-ip-address=10.9.0.1 "${head_arguments[@]}" >/tmp/head.log 2>&1 || { cat /tmp/head.log; exit 1; }
in_worker "${pod[@]}" ray start --address=10.9.0.1:6379 --node-ip-address=10.9.0.2 "${worker_arguments[@]}" >/tmp/worker.log 2>&1 \
  || { cat /tmp/worker.log; exit 1; }
"${pod[@]}" python - "$workdir/serve.json" "$token" <<'PYTHON'
"""Does what KubeRay does: hands the configuration to the dashboard, waits for the applications, asks for health."""
import json, sys, time, urllib.error, urllib.request

BASE = "http://10.9.0.1:8265/api/serve/applications/"


def call(url, data=None, token=None):
    headers = {"content-type": "application/json"} | ({"x-ray-authorization": f"Bearer {token}"} if token else {})
    request = urllib.request.Request(url, data=data, headers=headers, method="PUT" if data else "GET")
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


body, token = open(sys.argv[1], "rb").read(), sys.argv[2]
print("deploy without a token:", call(BASE, body)[0])
status, text = call(BASE, body, token)
print("deploy:", status, text if status != 200 else "")
deadline = time.monotonic() + 180
while True:
    applications = json.loads(call(BASE, token=token)[1])["applications"]
    states = {name: a["status"] for name, a in applications.items()}
    if states and set(states.values()) == {"RUNNING"}:
        break
    if "DEPLOY_FAILED" in states.values() or time.monotonic() > deadline:
        reasons = [[a["status"], a["message"], *(d["message"] for d in a["deployments"].values())] for a in applications.values()]
        sys.exit("\n".join(" ".join(reason) for reason in reasons))
    time.sleep(0.5)
print("applications:", json.dumps(states))
for host in ("10.9.0.1", "10.9.0.2"):
    while (answer := call(f"http://{host}:8000/-/healthz"))[0] != 200 and time.monotonic() < deadline:
        time.sleep(0.5)
    print("health", host, *answer, call(f"http://{host}:52365/api/healthz")[0])
PYTHON
"${pod[@]}" python "$client"
