"""Readable text of a graph: one line a node, in the order in which it runs through the user's program.

    graph of 2 runs, 3 nodes, 1 output
      run 0: 'The capital of France is'  1 row of 6 tokens
      run 1: 'The capital of Italy is'   1 row of 6 tokens
      %0 = run0.blocks[2].resid_post            float32[1, 6, 64]
      run1.blocks[2].resid_post[:, -1] = %1
      ...
      return p = %8

For reading only: nothing parses it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from patchbay.ir.artifacts import PREFIX
from patchbay.ir.fragments import Fragment, fold
from patchbay.ir.graph import Generation, Graph, Node, Run, TensorData
from patchbay.ir.ops.control import BODY_ATTRS
from patchbay.ir.sites import is_module_site

INFIX: Mapping[str, str] = {
    "add": "+",
    "subtract": "-",
    "multiply": "*",
    "divide": "/",
    "floor_divide": "//",
    "remainder": "%",
    "pow": "**",
    "matmul": "@",
    "equal": "==",
    "not_equal": "!=",
    "less": "<",
    "less_equal": "<=",
    "greater": ">",
    "greater_equal": ">=",
    "bitwise_and": "&",
    "bitwise_or": "|",
    "bitwise_xor": "^",
}
_WRITE = {"set": "=", "add": "+=", "mul": "*="}
_BLOCK = re.compile(r"\Ablocks\.(\d+)")
_MAX_VALUES = 6
_MAX_COLUMN = 60
_MAX_INDENT = 40


def render(
    graph: Graph,
    *,
    specs: Sequence[object] | None = None,
    locations: Sequence[str | None] | None = None,
    max_nodes: int | None = None,
    fragments: Sequence[Fragment | None] | None = None,
    body_locations: Sequence[Sequence[str | None]] = (),
) -> str:
    """`graph` as text.

    Args:
        graph: what to show.
        specs: the spec of each node, shown at the right when given.
        locations: ``file:line`` of each node, shown as a comment when given.
        max_nodes: leave out the middle of longer graphs; None shows everything.
        fragments: the named part that each node belongs to; every part is shown as one line.
        body_locations: ``file:line`` of each node of each body, shown as a comment when given.
    """
    runs, nodes, outputs = len(graph.runs), len(graph.nodes), len(graph.outputs)
    lines = [f"graph of {_count(runs, 'run')}, {_count(nodes, 'node')}, {_count(outputs, 'output')}"]
    shown_runs = _elide(range(runs), max_nodes)
    lines += ["  ..." if i is None else f"  run {i}: {describe_run(graph.runs[i])}" for i in shown_runs]
    folded = fold(graph, fragments) if fragments is not None else {}
    hidden = {n for line in folded.values() for n in line.nodes} - set(folded)
    shown = [i for i in range(nodes) if i not in hidden]
    if folded:
        lines[0] += f", {_count(len(folded), 'named part')}"
    left = {i: statement(graph, i) for n in _elide(range(len(shown)), max_nodes) if n is not None for i in [shown[n]]}
    left |= {i: line.statement for i, line in folded.items() if i in left}
    middle = {i: _show_specs(specs, folded[i].gives if i in folded else (i,)) for i in left}
    first = min(max(map(len, left.values()), default=0), _MAX_COLUMN)
    second = min(max(map(len, middle.values()), default=0), _MAX_COLUMN)
    told: set[int] = set()
    for n in _elide(range(len(shown)), max_nodes):
        if n is None:
            lines.append(f"  ... ({len(shown) - len(left)} more nodes)")
            continue
        i = shown[n]
        place = f"  # {locations[i]}" if locations is not None and locations[i] else ""
        lines.append(f"  {left[i]:<{first}}  {middle[i]:<{second}}{place}".rstrip())
        if i in folded:
            lines += [f"    in {folded[i].fragment}: {statement(graph, w)}" for w in folded[i].writes]
        else:
            lines += _bodies(graph, graph.nodes[i], told, "    ", max_nodes, body_locations)
    lines += [f"  {'keep' if o.keep else 'return'} {o.name} = %{o.node}" for o in graph.outputs]
    return "\n".join(lines)


def statement(graph: Graph, i: int) -> str:
    """Node `i` as a line of a program in which every value is assigned once."""
    node = graph.nodes[i]
    if node.op == "site.write":
        sign = _WRITE.get(str(node.attrs.get("mode", "set")), "?=")
        index = show_index(node.attrs.get("index", ()), [f"%{a}" for a in node.args[1:]])
        value = f"%{node.args[0]}" if node.args else "?"
        return f"{site_expression(node)}{index} {sign} {value}"
    return f"%{i} = {expression(node, [f'%{a}' for a in node.args])}"


def expression(node: Node, args: Sequence[str]) -> str:
    """What `node` computes, with `args` as the texts of its arguments."""
    attrs = node.attrs
    if node.op == "site.read":
        return site_expression(node)
    if node.op == "run.tokens":
        step = attrs.get("step")
        return f"run{node.run}.so_far" if step is None else f"run{node.run}.steps[{step}].so_far"
    if node.op == "steps.stack":
        return f"run{node.run}.stacked({', '.join(args)})"
    if node.op == "const":
        value = attrs.get("value")
        if isinstance(attrs.get("artifact"), str):
            return f"artifact({str(attrs['artifact'])[: len(PREFIX) + 12]})"
        return show_tensor(value) if isinstance(value, TensorData) else repr(attrs.get("scalar"))
    if node.op == "param.read":
        return f"params[{attrs.get('name')!r}]"
    if node.op == "item":
        return f"{args[0]}[{attrs.get('index')}]" if args else "item(?)"
    if node.op in BODY_ATTRS:
        return _loop(node, args)
    if node.op in INFIX and len(args) == 2:
        return f"{args[0]} {INFIX[node.op]} {args[1]}"
    if isinstance(attrs.get("index"), tuple) and args and node.op != "set_index":
        return f"{args[0]}{show_index(attrs['index'], args[1:])}"
    name = str(attrs.get("target", "call")) if node.op == "call" else node.op
    shown = [f"{k}={_show_attr(v, args)}" for k, v in attrs.items() if k != "target"]
    return f"{name}({', '.join([*args, *shown])})"


def _loop(node: Node, args: Sequence[str]) -> str:
    """``scan[body 0, 50 steps](%2; over %3; with %1)``."""
    attrs = node.attrs
    named = " | ".join(f"body {attrs.get(name)}" for name in BODY_ATTRS[node.op])
    if node.op == "cond":
        return f"cond[{named}]({'; '.join([*args[:1], ', '.join(args[1:])]) if len(args) > 1 else ', '.join(args)})"
    counts = [attrs.get(name, 0) for name in ("carry", "xs")] if node.op == "scan" else [0, attrs.get("mapped", 0)]
    first, second = (n if isinstance(n, int) and 0 <= n <= len(args) else 0 for n in counts)
    parts = [(("", args[:first])), ("over ", args[first : first + second]), ("with ", args[first + second :])]
    steps = f", {attrs.get('length')} steps" if node.op == "scan" else ""
    return f"{node.op}[{named}{steps}]({'; '.join(word + ', '.join(some) for word, some in parts if some)})"


def _bodies(
    graph: Graph,
    node: Node,
    told: set[int],
    indent: str,
    max_nodes: int | None,
    locations: Sequence[Sequence[str | None]],
) -> list[str]:
    """The bodies that `node` uses and that were not told before, their own values as ``$0``, ``$1``, ..."""
    lines: list[str] = []
    for name in BODY_ATTRS.get(node.op, ()):
        number = node.attrs.get(name)
        if not isinstance(number, int) or not 0 <= number < len(graph.bodies) or number in told:
            continue
        told.add(number)
        body = graph.bodies[number]
        specs = graph.body_facts[number].specs if number < len(graph.body_facts) else None
        first = len(body.params)
        numbers = {first + k: repr(n.attrs.get("scalar")) for k, n in enumerate(body.nodes) if n.op == "const"}
        takes = ", ".join(f"${i} {param!r}" for i, param in enumerate(body.params))
        lines.append(f"{indent}body {number} ({takes}):")
        shown = [k for k in range(len(body.nodes)) if first + k not in numbers]
        made = {
            k: f"${first + k} = {expression(n, [numbers.get(a, f'${a}') for a in n.args])}"
            for k in shown
            for n in [body.nodes[k]]
        }
        types = {k: "" if specs is None else show_spec(specs[first + k]) for k in shown}
        width, second = (min(max(map(len, c.values()), default=0), _MAX_COLUMN) for c in (made, types))
        for at in _elide(range(len(shown)), max_nodes):
            if at is None:
                lines.append(f"{indent}  ...")
                continue
            k = shown[at]
            known = number < len(locations) and k < len(locations[number])
            place = f"  # {locations[number][k]}" if known and locations[number][k] else ""
            lines.append(f"{indent}  {made[k]:<{width}}  {types[k]:<{second}}{place}".rstrip())
            if len(indent) < _MAX_INDENT:  # no valid graph nests deeper
                lines += _bodies(graph, body.nodes[k], told, indent + "    ", max_nodes, locations)
        gives = (numbers.get(r, f"${r}") for r in body.results)
        lines.append(f"{indent}  gives {', '.join(gives)}")
    return lines


def site_expression(node: Node) -> str:
    """``run0.blocks[2].resid_post`` for a read or write."""
    step = node.attrs.get("step")
    at = "" if step is None else f".steps[{step}]"
    return f"run{node.run}{at}.{site_path(str(node.attrs.get('site', '?')))}"


def site_path(site: str) -> str:
    """A canonical site as it is written in Python, behind a run."""
    if is_module_site(site):
        path, _, side = site[len("module:") :].rpartition(".")
        return f"module({path!r}).{side}"
    return _BLOCK.sub(r"blocks[\1]", site)


def show_index(index: object, arrays: Sequence[str]) -> str:
    """An index in brackets as Python would write it; nothing for the whole."""
    if not isinstance(index, tuple) or not index:
        return ""
    return f"[{', '.join(_show_item(item, arrays) for item in index)}]"


def _show_item(item: Any, arrays: Sequence[str]) -> str:
    if not isinstance(item, tuple) or not item:
        return "?"
    kind, parts = item[0], item[1:]
    if kind == "slice" and len(parts) == 3:
        start, stop, step = ("" if p is None else str(p) for p in parts)
        return f"{start}:{stop}" + (f":{step}" if step else "")
    if kind == "array" and parts and isinstance(parts[0], int) and 0 <= parts[0] < len(arrays):
        return arrays[parts[0]]
    return {"ellipsis": "...", "newaxis": "None"}.get(str(kind), str(parts[0]) if parts else "?")


def show_tensor(data: TensorData) -> str:
    """A constant: its values when there are few, else its spec."""
    shape = ", ".join(map(str, data.shape))
    values = _values(data)
    return f"{data.dtype}[{shape}]" + (f"({values})" if values else "(...)")


def show_spec(spec: object) -> str:
    """``float32[1, 6, 64]``; several for operations with several results."""
    return ", ".join(map(repr, spec)) if isinstance(spec, tuple) else repr(spec)


def _show_specs(specs: Sequence[object] | None, nodes: Sequence[int]) -> str:
    return "" if specs is None else ", ".join(show_spec(specs[i]) for i in nodes if specs[i] != ())


def describe_run(run: Run) -> str:
    """A run's label, rows and lengths."""
    label = f"{run.label!r}  " if run.label else ""
    lengths = f"{run.seq}" if not run.ragged else f"{min(run.lengths)} to {run.seq}"
    more = f", {describe_generation(run.generation)}" if run.generation else ""
    return f"{label}{_count(run.rows, 'row')} of {lengths} token{'s' if run.seq != 1 else ''}{more}"


def describe_generation(how: Generation) -> str:
    """``generates up to 20 tokens, temperature 0.7, seed 3``."""
    parts = [f"generates up to {_count(how.max_new_tokens, 'token')}"]
    if how.temperature:
        parts.append(f"temperature {how.temperature:g}")
        parts += [f"top_k {how.top_k}"] if how.top_k else []
        parts += [f"top_p {how.top_p:g}"] if how.top_p < 1 else []
        parts.append(f"seed {how.seed}")
    return ", ".join(parts)


def _values(data: TensorData) -> str:
    """The elements of a small tensor of a type that the standard library can unpack."""
    codes = {"bool": "?", "uint8": "B", "int8": "b", "int16": "h", "int32": "i", "int64": "q"}
    codes |= {"float16": "e", "float32": "f", "float64": "d"}
    code = codes.get(data.dtype.name)
    count = data.nbytes // data.dtype.itemsize
    if code is None or count > _MAX_VALUES:
        return ""
    import struct

    values = struct.unpack(f"<{count}{code}", bytes(data.data))
    return ", ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in values)


def _show_attr(value: object, args: Sequence[str]) -> str:
    if isinstance(value, TensorData):
        return show_tensor(value)
    if isinstance(value, tuple) and value and all(isinstance(v, tuple) for v in value):
        return show_index(value, args[1:])
    return repr(value)


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def _elide(items: range, limit: int | None) -> list[int | None]:
    if limit is None or len(items) <= limit:
        return list(items)
    half = max(limit // 2, 1)
    return [*items[:half], None, *items[len(items) - half :]]
