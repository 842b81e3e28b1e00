"""Maps that run side by side: every operation under torch.func.vmap against the same operation slice by slice."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from patchbay.errors import GraphError
from patchbay.ir.ops import PURE
from patchbay.ir.ops.spec import OpSpec
from patchbay_server import kernels
from patchbay_server.engine.loops import ONE_BY_ONE
from tests.cpu.test_kernels import _TOLERANCE, assert_close, to_torch, to_wide
from tests.op_examples import op_examples

SIDE_BY_SIDE = [spec for spec in PURE if spec.params and spec.name not in ONE_BY_ONE]


@pytest.mark.parametrize("spec", SIDE_BY_SIDE, ids=lambda spec: spec.name)
def test_an_operation_side_by_side(spec: OpSpec) -> None:
    """Where torch runs an operation over slices at once, every slice is what the operation gives by itself."""

    @given(op_examples(spec), st.integers(0, 7))
    @settings(max_examples=10, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    def check(example: Any, chosen: int) -> None:
        args, attrs = [to_torch(a) for a in example[0]], spec.fill(example[1])
        tensors = [i for i, a in enumerate(args) if isinstance(a, torch.Tensor)]
        mapped = [i for n, i in enumerate(tensors) if chosen >> n & 1] or tensors[:1]
        function = kernels.kernel(spec)

        def one(*slices: torch.Tensor) -> tuple[torch.Tensor, ...]:
            given = list(args)
            for i, value in zip(mapped, slices, strict=True):
                given[i] = value
            value = function(*given, **attrs)
            return value if isinstance(value, tuple) else (value,)

        # Three slices that differ: the argument, its elements turned round, and the argument again.
        given = [example[0][i] for i in mapped]
        stacks = [to_torch(np.stack([a, np.flip(a), a])) for a in given]
        try:
            together = torch.func.vmap(one)(*stacks)
            apart = [one(*(s[i] for s in stacks)) for i in range(3)]
        except (GraphError, RuntimeError, ValueError, TypeError):
            return  # the engine goes on slice by slice
        for k, whole in enumerate(together):
            for i in range(3):
                wanted = apart[i][k]
                assert whole.dtype == wanted.dtype and whole[i].shape == wanted.shape
                tolerance = _TOLERANCE.get(str(wanted.dtype).removeprefix("torch."), 1e-6)
                if np.isnan(to_wide(wanted)).any() and spec.name in UNSPECIFIED_WITH_NAN:
                    continue
                assert_close(whole[i], to_wide(wanted), tolerance)

    check()


#: What an operation's numbers are where its input holds NaN is left open for these.
UNSPECIFIED_WITH_NAN = frozenset({"sort", "argsort", "topk"})
