"""The notes that helm prints after an installation."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.chart import charts

pytestmark = pytest.mark.chart


def notes(tmp: Path, example: str | None, values: dict[str, Any] | None = None) -> str:
    """What `helm install` would print (helm renders notes only with a cluster, so they are rendered as a manifest)."""
    chart = tmp / "chart"
    shutil.copytree(charts.CHART, chart)
    (chart / "notes.txt").write_text((chart / "templates" / "NOTES.txt").read_text(encoding="utf-8"), encoding="utf-8")
    for template in (chart / "templates").glob("*.yaml"):
        template.unlink()
    (chart / "templates" / "notes.yaml").write_text(
        'kind: Notes\ntext: {{ tpl (.Files.Get "notes.txt") . | toJson }}\n', encoding="utf-8"
    )
    (tmp / "values.yaml").write_text(yaml.safe_dump(values or {}), encoding="utf-8")
    files = ["--values", str(tmp / "values.yaml")]
    if example:
        files = ["--values", str(charts.CHART / "ci" / f"{example}-values.yaml"), *files]
    text = charts.run("template", "patchbay", str(chart), "--kube-version", charts.KUBERNETES, *files)
    rendered = yaml.safe_load(text)["text"]
    assert isinstance(rendered, str)
    return rendered


def test_notes_lead_to_a_first_trace(tmp_path: Path) -> None:
    """The notes say how to read the key and reach the port, and their Python compiles and names a hosted model."""
    text = notes(tmp_path, None)
    assert "secret patchbay-first-key" in text
    assert "port-forward service/patchbay 9000:9000" in text
    snippet = text[text.index("import patchbay") :]
    source = "\n".join(line.removeprefix("  ") for line in snippet.splitlines())
    compile(source, "NOTES.txt", "exec")
    assert '.model("demo")' in source


@pytest.mark.parametrize("example", ["gpu-8b", "two-models"])
def test_notes_name_the_public_address(example: str, tmp_path: Path) -> None:
    """Behind a Gateway or an Ingress the notes give its address, and the Secret of keys that the operator named."""
    text = notes(tmp_path, example)
    assert "grpcs://patchbay.example.org:443" in text
    assert "port-forward" not in text
    assert re.search(r"Secret (patchbay|team)-keys", text)


def test_notes_warn_of_no_keys(tmp_path: Path) -> None:
    """With config.insecure the notes say that anybody may use the service."""
    text = notes(tmp_path, None, {"config": {"insecure": True}})
    assert "anybody" in text
    assert "first-key" not in text
