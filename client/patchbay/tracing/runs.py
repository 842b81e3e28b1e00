"""One forward of the model as the user sees it: its tokens, the positions of words, and its sites as attributes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from patchbay.errors import TraceError
from patchbay.ir.sites import Address, canonical
from patchbay.places import located
from patchbay.tokens import Tokens
from patchbay.tracing.continuations import appended, continuations_of, predicted
from patchbay.tracing.namespaces import ModuleSites, SiteNamespace, module_sites, read_site
from patchbay.tracing.proxy import Proxy

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from typing_extensions import Never

    from patchbay.results import Results, RunUsage
    from patchbay.tracing.builder import TracedGraph
    from patchbay.tracing.params import TraceParams
    from patchbay.tracing.trace import BaseTrace
    from patchbay.tracing.typed import RunSites
else:
    RunSites = SiteNamespace

#: Names of a run that are no sites.
OWN = frozenset(
    {
        "apply",
        "estimate",
        "graph",
        "index",
        "keep",
        "label",
        "logprob",
        "mask",
        "module",
        "params",
        "position",
        "results",
        "rows",
        "save",
        "seq",
        "site",
        "tokens",
        "trace",
        "usage",
        "validate",
    }
)


class Run(RunSites):
    """A run of a trace. Sites hang off it: ``run.blocks[2].resid_post``, ``run.ln_final.normalized``, ``run.logits``.

    Reading a site gives the value at that point of the program: after the writes that stand above, before those below.
    """

    __slots__ = ("_row_tokens", "_single")

    if TYPE_CHECKING:
        _row_tokens: tuple[Tokens, ...]
        _single: bool

    def __init__(self, trace: BaseTrace, index: int, tokens: Sequence[Tokens], single: bool) -> None:
        super().__init__(trace, index, trace.site_tree, "")
        object.__setattr__(self, "_row_tokens", tuple(tokens))
        object.__setattr__(self, "_single", single)

    # --- what went in ---------------------------------------------------------------------------------------------

    @property
    def trace(self) -> BaseTrace:
        """The trace that this run belongs to."""
        return self._trace

    @property
    def index(self) -> int:
        """Its number in the trace, from 0."""
        return self._run_index

    @property
    def label(self) -> str:
        """What it is called in errors and printed graphs."""
        return self._trace.builder.runs[self._run_index].label

    @property
    def rows(self) -> int:
        """Number of rows: the extent of every site's first axis."""
        return self._trace.builder.runs[self._run_index].rows

    @property
    def seq(self) -> int:
        """Length of the longest row: the extent of the sequence axes; shorter rows are padded on the left."""
        return self._trace.builder.runs[self._run_index].seq

    @property
    def tokens(self) -> tuple[Tokens, ...]:
        """The tokens of each row, without padding."""
        return self._row_tokens

    @property
    def mask(self) -> NDArray[Any]:
        """Booleans [rows, seq]: True at tokens, False at the padding on the left of shorter rows."""
        import numpy as np

        lengths = np.array([[len(t)] for t in self._row_tokens])
        return np.arange(self.seq)[None, :] >= self.seq - lengths

    @located
    def position(self, substring: str, *, occurrence: int | None = None) -> Any:
        """Where `substring` ends: the last token that overlaps it, counted along the sequence axis.

        Args:
            substring: part of the text.
            occurrence: which one, when it stands there several times: 0 the first, -1 the last.

        Returns:
            An int for a run over one text; for a list of texts an integer array [rows], to be used as
            ``site[range(run.rows), run.position("France")]``.

        Raises:
            TraceError: the text is not there, is there several times, or the run was made from token ids.
        """
        found = [self.seq - len(t) + t.position(substring, occurrence=occurrence) for t in self._row_tokens]
        if self._single:
            return found[0]
        import numpy as np

        return np.array(found, dtype=np.int64)

    @located
    def logprob(self, text: Any, *, occurrence: int | None = None, append: bool | None = None) -> Proxy:
        """How likely the model finds a text of several tokens: the log-probabilities of its tokens, each after all that
        is before it, summed.

        A text that stands in the run is scored where it stands. One that does not is appended: a further run of the
        same rows with the continuation behind them (``run.logprob(" Paris")``). What was written in this run so far
        holds there at the run's own positions; to write at the continuation's too, make a run of the whole text.

        Args:
            text: a text, which as a continuation is tokenized by itself; token ids or `Tokens`, which are appended; or
                a list of such, one for each row.
            occurrence: which one, when it stands there several times.
            append: whether to append it; None does so where the text does not stand in every row.

        Returns:
            A number for a run over one text, an array [rows] for a list of texts.

        Raises:
            TraceError: as `position`; the text begins with it, so that nothing predicts it; too long with it.
        """
        if append is None:
            append = not isinstance(text, str) or any(t.text is None or text not in t.text for t in self._row_tokens)
        if append:
            return appended(self, continuations_of(self, text), self._single)
        rows: list[int] = []
        places: list[int] = []
        ids: list[int] = []
        for row, tokens in enumerate(self._row_tokens):
            hits = tokens.positions(text, occurrence=occurrence)
            if hits[0] == 0:
                raise TraceError(f"nothing stands before {text!r} in row {row}, so nothing predicts it")
            rows += [row] * len(hits)
            places += [self.seq - len(tokens) + hit - 1 for hit in hits]
            ids += [tokens.ids[hit] for hit in hits]
        return predicted(self, rows, places, ids, self._single)

    # --- sites by other means -------------------------------------------------------------------------------------

    @located
    def site(self, address: Address) -> Proxy:
        """The value at a site by name, in any spelling of `patchbay.ir.sites`; assign with ``run.site(name)[...] = v``.

        Raises:
            UnknownSiteError: the model has no such site; the message names the nearest.
        """
        card = self._trace.builder.card
        return read_site(self._trace, self._run_index, card.site(canonical(address, card.n_layers)).name)

    @located
    def module(self, path: str) -> ModuleSites:
        """A module by its path in the checkpoint; its sites are ``.output`` and ``.input``.

        Raises:
            UnknownSiteError: the model has no such module; the message names the nearest.
        """
        return module_sites(self._trace, self._run_index, path)

    def apply(self, name: str, value: object) -> Proxy:
        """`value` put through a module of the model; see `Trace.apply`."""
        return self._trace.apply(name, value)

    @property
    def params(self) -> TraceParams:
        """The model's weights by name; see `Trace.params`."""
        return self._trace.params

    # --- the trace, for runs that are the whole of it ---------------------------------------------------------------

    def save(self, *unnamed: Never, **trees: Any) -> None:
        """Asks for values by name; see `Trace.save`."""
        self._trace.save(*unnamed, **trees)

    def keep(self, name: str, tree: Any) -> Any:
        """Leaves values on the server; see `Trace.keep`."""
        return self._trace.keep(name, tree)

    @property
    def results(self) -> Results:
        """Saved values by name; see `Trace.results`."""
        return self._trace.results

    @property
    def usage(self) -> RunUsage:
        """What the trace cost; see `Trace.usage`."""
        return self._trace.usage

    @property
    def graph(self) -> TracedGraph:
        """The trace's graph; see `Trace.graph`."""
        return self._trace.graph

    def validate(self) -> None:
        """Checks the trace's graph without running it; see `Trace.validate`."""
        self._trace.validate()

    def estimate(self, *, remote: bool = False) -> Any:
        """Prices the trace's graph without running it; see `Trace.estimate` (awaited in an async trace)."""
        return self._trace.estimate(remote=remote)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in OWN:
            raise AttributeError(f"{name} of a run cannot be assigned")
        super().__setattr__(name, value)

    def __call__(self, value: object) -> Proxy:
        raise TypeError("a run cannot be called")

    def __dir__(self) -> list[str]:
        callables = [c.name for c in self._trace.builder.card.callables]
        return sorted({*self._tree, *OWN, *callables})

    def __repr__(self) -> str:
        shape = f"{self.rows} row{'s' if self.rows != 1 else ''} x {self.seq} tokens"
        return f"<run {self._run_index} {self.label!r}: {shape}, of {self._trace.builder.card.name!r}>"
