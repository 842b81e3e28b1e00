"""Sites as attributes: ``run.blocks[3].attn.pattern`` reads, ``run.blocks[3].mlp_out = v`` writes.

The tree of names comes from the model's card, so that tab completion shows exactly what the model has.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeAlias

from patchbay.arguments import nearest, refused, seen
from patchbay.errors import ArgumentError, GraphError, TraceError, UnknownSiteError
from patchbay.ir.card import SEQUENCE_DIMS, ModelCard
from patchbay.ir.sites import MODULE_SIDES, canonical, is_module_site, module_site
from patchbay.places import here, located
from patchbay.tracing.proxy import Proxy, lift, write_site

if TYPE_CHECKING:
    from patchbay.ir.graph import Attr
    from patchbay.tracing.trace import BaseTrace

#: Names at one level: a site's canonical name, or the level below.
SiteTree: TypeAlias = "dict[str, str | SiteTree]"
#: Which forward of a generating run: its number, None for every one, ALL_STEPS to read all of them stacked.
Step: TypeAlias = "int | str | None"
ALL_STEPS = "all"


#: What Python would ask a group of sites for in an expression.
_OPERATORS = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor")
_COMPARISONS = ("lt", "le", "gt", "ge", "neg", "abs", "invert", "float", "int")


class UnknownSiteAttributeError(UnknownSiteError, AttributeError):
    """An unknown site reached as an attribute: also an AttributeError, so that ``hasattr`` answers False."""


def site_tree(card: ModelCard) -> SiteTree:
    """The canonical sites of `card` by the parts of their names; sites that the model cannot offer are left out."""
    root: SiteTree = {}
    for site in card.sites:
        if is_module_site(site.name) or site.absent is not None:
            continue
        *path, leaf = site.name.split(".")
        level = root
        for part in path:
            below = level.setdefault(part, {})
            if isinstance(below, str):
                break
            level = below
        else:
            level.setdefault(leaf, site.name)
    return root


class SiteNamespace:
    """One level of site names of a run."""

    __slots__ = ("_prefix", "_run_index", "_step", "_trace", "_tree")

    def __init__(self, trace: BaseTrace, run_index: int, tree: SiteTree, prefix: str, step: Step = None) -> None:
        fill = object.__setattr__  # plain assignment means writing at a site
        fill(self, "_trace", trace)
        fill(self, "_run_index", run_index)
        fill(self, "_tree", tree)
        fill(self, "_prefix", prefix)
        fill(self, "_step", step)

    if TYPE_CHECKING:
        _trace: BaseTrace
        _run_index: int
        _tree: SiteTree
        _prefix: str
        _step: Step

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        found = self._tree.get(name)
        if isinstance(found, str):
            return read_site(self._trace, self._run_index, found, self._step)
        if found is not None:
            return namespace(self._trace, self._run_index, found, self._prefix + name, self._step)
        return self._outside_tree(name)

    def __setattr__(self, name: str, value: Any) -> None:
        found = self._tree.get(name)
        if not isinstance(found, str):
            if found is not None:
                raise TraceError(f"{self._prefix + name} is a group of sites, not a site: {', '.join(sorted(found))}")
            found = self._canonical(name)
        write_site(self._trace, self._run_index, found, (), (), value, one_step(self._step))

    def _outside_tree(self, name: str) -> Any:
        """A callable of the model, another tool's spelling of a site, or an error with the nearest names."""
        trace = self._trace
        if not self._prefix and any(c.name == name for c in trace.builder.card.callables):
            return Callable(trace, name)
        return read_site(trace, self._run_index, self._canonical(name), self._step)

    def _canonical(self, name: str) -> str:
        card = self._trace.builder.card
        try:
            return card.site(canonical(self._prefix + name, card.n_layers)).name
        except UnknownSiteError as error:
            group = nearest(name, [key for key, below in self._tree.items() if not isinstance(below, str)])
            if group:
                message = f"{card.name!r} has no site {self._prefix + name!r}{group}"
            else:
                message = error.message + ("" if error.suggestions else self._hint(name))
            raise UnknownSiteAttributeError(message, suggestions=error.suggestions, location=here()) from None

    def _hint(self, name: str) -> str:
        """What else `name` may have meant: a name at this level, or the beginning of a module's path."""
        near = nearest(name, dir(self))
        if near:
            return near
        card = self._trace.builder.card
        path = next((s.name for s in card.sites if s.name.startswith(f"module:{name}.")), None)
        if path is not None and not self._prefix:
            shown = path.removeprefix("module:").rpartition(".")[0]
            return f"; modules of the checkpoint are reached by their paths: run.module({shown!r}).output"
        sites = ", ".join(k for k, v in self._tree.items() if isinstance(v, str))
        return f" (here: {sites})" if sites else ""

    def __call__(self, value: object) -> Proxy:
        return Callable(self._trace, self._prefix.rstrip("."))(value)

    def __getitem__(self, index: Any) -> Any:
        raise self._group_error()

    def __setitem__(self, index: object, value: object) -> None:
        raise self._group_error()

    def _group_error(self) -> ArgumentError:
        """The error for a group of sites where a value is wanted."""
        prefix = self._prefix.rstrip(".")
        if not prefix:
            what, how = "a run is no value", "run.blocks[2].resid_post, or run.site('blocks.2.resid_post')"
        else:
            what, how = f"{prefix} is a group of sites, not a value", ", ".join(self._tree)
        return ArgumentError(f"{what}; take a site of it: {how}", location=here())

    @located
    def skip(self, value: object = None, *, rows: object = None) -> None:
        """Leaves this part of the model out: ``run.blocks[3].skip()``, ``.attn.skip()``, ``.mlp.skip()``.

        A block hands on the stream as it came; attention or an MLP adds nothing to it. It is a write like any other,
        and a whole block that nothing else looks into is then not computed at all.

        Args:
            value: what takes the place of its output instead: the stream behind a block, or what is added to it.
            rows: the rows that leave it out, as an index; all of them by default.

        Raises:
            TraceError: this is neither a block nor a part of one whose output is a site.
        """
        prefix = self._prefix.rstrip(".")
        if "resid_pre" in self._tree and "resid_post" in self._tree:
            site = f"{prefix}.resid_post"
            kept: Any = read_site(self._trace, self._run_index, f"{prefix}.resid_pre", self._step)
            if value is None:
                value = kept if rows is None else kept[rows]
        elif prefix and f"{prefix}_out" in self._trace.builder.card:
            site = f"{prefix}_out"
            value = 0.0 if value is None else value
        else:
            raise TraceError(
                f"{prefix or 'a run'} is no part that can be skipped; say run.blocks[3], its attn or its mlp"
            )
        step = one_step(self._step)
        if rows is None:
            write_site(self._trace, self._run_index, site, (), (), value, step)
        else:
            read_site(self._trace, self._run_index, site, step)[rows] = value

    def __copy__(self) -> SiteNamespace:
        return self

    def __deepcopy__(self, memo: object) -> SiteNamespace:
        return self

    def __reduce__(self) -> str:
        raise TraceError("a run and its sites belong to their trace and cannot be pickled; keep the results")

    def __dir__(self) -> list[str]:
        return sorted(self._tree)

    def __repr__(self) -> str:
        run = self._trace.builder.run_name(self._run_index)
        return f"<sites {self._prefix.rstrip('.')} of run {run}: {', '.join(self._tree)}>"


def _no_value(self: SiteNamespace, *others: object) -> Any:
    raise self._group_error()


for _name in (*_OPERATORS, *(f"r{name}" for name in _OPERATORS), *_COMPARISONS):
    setattr(SiteNamespace, f"__{_name}__", _no_value)


class NumberedNamespace(SiteNamespace):
    """Levels told apart by number, such as ``run.blocks``; negative numbers count from the end."""

    __slots__ = ()

    def __getitem__(self, index: object) -> SiteNamespace:
        if isinstance(index, slice):
            raise TraceError(
                f"{self._prefix.rstrip('.')} takes one number at a time; for several write a loop:"
                " [run.blocks[i].resid_post for i in range(...)], joined by pb.ops.stack"
            )
        if isinstance(index, Proxy):
            raise TraceError("which block to read must be known before the run; it cannot be a value of the trace")
        try:
            number = operator.index(index)  # type: ignore[arg-type]
        except TypeError:
            raise refused(f"{self._prefix.rstrip('.')} takes an integer, not {seen(index)}") from None
        count = len(self)
        found = self._tree.get(str(number + count if number < 0 else number))
        if found is None or isinstance(found, str):
            raise UnknownSiteError(
                f"{self._prefix.rstrip('.')}[{number}]: there are {count}, 0 to {count - 1}", location=here()
            )
        return namespace(self._trace, self._run_index, found, f"{self._prefix}{number % count}", self._step)

    def __len__(self) -> int:
        return len(self._tree)

    def __iter__(self) -> Iterator[SiteNamespace]:
        return (self[i] for i in range(len(self)))


def namespace(trace: BaseTrace, run_index: int, tree: SiteTree, path: str, step: Step = None) -> SiteNamespace:
    """The namespace for one level of the tree."""
    numbered = bool(tree) and all(key.isdigit() for key in tree)
    return (NumberedNamespace if numbered else SiteNamespace)(trace, run_index, tree, f"{path}.", step)


class ModuleSites:
    """Both sides of one module of the checkpoint: ``run.module("model.layers.3.mlp").output``."""

    __slots__ = ("_path", "_run_index", "_step", "_trace")

    def __init__(self, trace: BaseTrace, run_index: int, path: str, step: Step = None) -> None:
        object.__setattr__(self, "_trace", trace)
        object.__setattr__(self, "_run_index", run_index)
        object.__setattr__(self, "_path", path)
        object.__setattr__(self, "_step", step)

    if TYPE_CHECKING:
        _trace: BaseTrace
        _run_index: int
        _path: str
        _step: Step

    def __getattr__(self, name: str) -> Proxy:
        if name.startswith("_"):
            raise AttributeError(name)
        return read_site(self._trace, self._run_index, self._name(name), self._step)

    def __setattr__(self, name: str, value: object) -> None:
        write_site(self._trace, self._run_index, self._name(name), (), (), value, one_step(self._step))

    def __call__(self, value: object) -> Proxy:
        """`value` put through the module; see `Trace.apply`."""
        return Callable(self._trace, self._path)(value)

    def _name(self, side: str) -> str:
        try:
            return self._trace.builder.card.site(module_site(self._path, side)).name
        except UnknownSiteError as error:
            raise UnknownSiteAttributeError(error.message, suggestions=error.suggestions) from None

    def __dir__(self) -> list[str]:
        return list(MODULE_SIDES)

    def __repr__(self) -> str:
        return f"<module {self._path} of run {self._trace.builder.run_name(self._run_index)}: output, input>"


class Callable:
    """A module of the model that values of the graph can be put through, such as ``run.unembed``."""

    __slots__ = ("_name", "_trace")

    def __init__(self, trace: BaseTrace, name: str) -> None:
        self._trace = trace
        self._name = name

    @located
    def __call__(self, value: object) -> Proxy:
        """`value` put through the module over its last axis."""
        builder = self._trace.builder
        builder.card.callable(self._name)
        return Proxy(self._trace, builder.add("call", (lift(self._trace, value),), {"target": self._name}))

    def __repr__(self) -> str:
        spec = self._trace.builder.card.callable(self._name)
        return f"<{spec.name}: {spec.d_in} -> {spec.d_out}>"


def module_sites(trace: BaseTrace, run_index: int, path: str, step: Step = None) -> ModuleSites:
    """Both sides of a module.

    Raises:
        UnknownSiteError: the model has no such module; the message names the nearest.
    """
    card = trace.builder.card
    sides = [module_site(path, side) for side in MODULE_SIDES]
    if not any(side in card for side in sides):
        near = tuple(dict.fromkeys(n.removeprefix("module:").rpartition(".")[0] for n in card.nearest(sides[0], 5)))
        hint = f"; did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
        raise UnknownSiteError(f"{card.name!r} has no module {path!r}{hint}", suggestions=near)
    return ModuleSites(trace, run_index, path, step)


def one_step(step: Step) -> int | None:
    """
    Raises:
        TraceError: `step` is all of them, stacked, which can only be read.
    """
    if isinstance(step, str):
        raise TraceError("run.all_steps is for reading; a write at the run itself happens at every step")
    return step


def read_site(trace: BaseTrace, run_index: int, site: str, step: Step = None) -> Proxy:
    """The value at a canonical site, as the program has it at this point."""
    builder = trace.builder
    if isinstance(step, str):
        dims = builder.card.site(site).dims
        if "key" in dims:
            raise GraphError(f"{site} grows with every step, so its values cannot be stacked; read run.steps[k]")
        value = read_site(trace, run_index, site)
        newest = next((i for i, d in enumerate(dims) if d in SEQUENCE_DIMS), None)
        if newest is not None:
            index: tuple[object, ...] = (*[slice(None)] * newest, -1)
            value = value[index]
        return Proxy(trace, builder.add("steps.stack", (value._node,), {}, run_index))
    attrs: dict[str, Attr] = {"site": site} if step is None else {"site": site, "step": step}
    return Proxy(trace, builder.add("site.read", (), attrs, run_index))
