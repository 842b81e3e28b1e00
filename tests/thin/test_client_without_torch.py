"""A client that has only the wheel and its base dependencies works against a real server in another process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from .conftest import RunPython
from .plain_server import tiny_model, tiny_tokenizer

CLEAN, CORRUPT = "the cat sat on the", "the dog sat on the"

# Patches the clean run's last position into the other run after block 0, and scales its second block's MLP.
CLIENT = f"""
import json, sys
import patchbay as pb
client = pb.connect("127.0.0.1:PORT")
model = client.model("tiny")
with model.trace() as t:
    a, b = t.run({CLEAN!r}), t.run({CORRUPT!r})
    b.blocks[0].resid_post[:, -1] = a.blocks[0].resid_post[:, -1]
    b.blocks[1].mlp_out *= 0.5
    t.save(h=b.blocks[1].resid_post[:, -1], p=b.logits[:, -1].softmax(-1))
client.close()
results = {{name: t.results[name].astype("float64").tolist() for name in ("h", "p")}}
heavy = sorted({{"torch", "ray", "transformers", "pydantic", "patchbay_server"}} & set(sys.modules))
print(json.dumps({{"results": results, "heavy": heavy}}))
"""


@pytest.fixture(scope="module")
def port() -> Iterator[str]:
    """The port of a plain gRPC server in a process of its own."""
    server = subprocess.Popen(
        [sys.executable, Path(__file__).with_name("plain_server.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdin is not None
    assert server.stdout is not None
    with server:
        try:
            printed = server.stdout.readline().strip()
            assert printed.isdigit(), f"the server did not start (exit status {server.poll()})"
            yield printed
        finally:
            server.stdin.close()
            server.wait(timeout=60)


def by_hand() -> dict[str, torch.Tensor]:
    """What the client's graph means, with plain PyTorch hooks."""
    model = tiny_model()
    ids = [torch.tensor([tiny_tokenizer()(text)["input_ids"]]) for text in (CLEAN, CORRUPT)]
    first, second = model.model.layers
    kept = {}

    def keep(name: str):
        return lambda module, args, output: kept.__setitem__(name, output.clone())

    def patch(module, args, output):
        output = output.clone()
        output[:, -1] = kept["clean"][:, -1]
        return output

    with torch.no_grad():
        hook = first.register_forward_hook(keep("clean"))
        model(ids[0])
        hook.remove()
        first.register_forward_hook(patch)
        second.mlp.register_forward_hook(lambda module, args, output: output * 0.5)
        second.register_forward_hook(keep("h"))
        logits = model(ids[1]).logits
    return {"h": kept["h"][:, -1], "p": logits[:, -1].softmax(-1)}


@pytest.mark.parametrize("environment", ["thin_python", "lowest_python"])
def test_a_thin_client_patches_a_real_model(
    environment: str, port: str, run_python: RunPython, request: pytest.FixtureRequest
) -> None:
    """With locked and with the oldest allowed dependencies, a trace over two runs gives what hooks by hand give."""
    printed = run_python(request.getfixturevalue(environment), CLIENT.replace("PORT", port))
    answer = json.loads(printed.splitlines()[-1])
    assert answer["heavy"] == []
    for name, expected in by_hand().items():
        torch.testing.assert_close(
            torch.tensor(answer["results"][name], dtype=torch.float64), expected.double(), atol=1e-6, rtol=1e-5
        )
