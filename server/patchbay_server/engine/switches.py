"""What can be switched off, by the names that requests and `usage.saved` use."""

from __future__ import annotations

from patchbay.ir.events import COMPRESSION
from patchbay_server.engine.bodies import LOOP_INVARIANTS, SIDE_BY_SIDE
from patchbay_server.engine.constants import ARTIFACT_CACHE
from patchbay_server.engine.folding import FOLD_CONSTANTS
from patchbay_server.engine.optimize import PASSES

#: Optimisations of the planner and the executor, by the name that switches them off.
SKIP_LAYERS = "skip_layers"
BATCH_RUNS = "batch_runs"
EARLY_STOP = "early_stop"
LIVENESS = "liveness"
COMPILE = "compile"
COBATCH = "cobatch"
CONTINUOUS_BATCHING = "continuous_batching"
FUSE_WRITES = "fuse_writes"
WINDOWS = "windows"
NARROW_LOGITS = "narrow_logits"
LOGIT_COLUMNS = "logit_columns"
SHARED_PREFIX = "shared_prefix"
PREFIX_CACHE = "prefix_cache"
RECURRING_GRAPHS = "recurring_graphs"
FAST_PRODUCTS = "fast_products"
LAST_LAYER = "last_layer"
ONE_KERNEL = "one_kernel"
OPTIMISATIONS = (
    FOLD_CONSTANTS,
    *PASSES,
    LOOP_INVARIANTS,
    SIDE_BY_SIDE,
    *(WINDOWS, NARROW_LOGITS, LOGIT_COLUMNS, SHARED_PREFIX, PREFIX_CACHE, FAST_PRODUCTS, ONE_KERNEL, LAST_LAYER),
    *(BATCH_RUNS, EARLY_STOP, LIVENESS, COMPILE, SKIP_LAYERS, COBATCH, CONTINUOUS_BATCHING, FUSE_WRITES),
    ARTIFACT_CACHE,
    RECURRING_GRAPHS,
    COMPRESSION,  # not the engine's, but switched off by the same list
)
