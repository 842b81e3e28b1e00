"""Runs that generate: their steps as places to read and write, and what they generated.

A site of the run itself means every forward: the prompt's, then one for each token. ``run.prefill`` and
``run.steps[k]`` mean one of them, ``run.all_steps`` reads the newest position of each, stacked.
"""

from __future__ import annotations

import asyncio
import operator
import secrets
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict, overload

from patchbay.arguments import check_names, flag, integer, real, refused, seen
from patchbay.arrays import to_array
from patchbay.errors import IndexOutOfRangeError, InvalidRequestError, TraceError
from patchbay.inputs import Text
from patchbay.ir.events import Event, TensorValue
from patchbay.ir.graph import Generation
from patchbay.ir.sites import Address, canonical
from patchbay.tracing.namespaces import ALL_STEPS, ModuleSites, SiteNamespace, Step, module_sites, read_site
from patchbay.tracing.proxy import Proxy, lift
from patchbay.tracing.runs import OWN, Run

if TYPE_CHECKING:
    from patchbay.core import ModelCore
    from patchbay.tracing.trace import BaseTrace
    from patchbay.tracing.typed import RunSites
else:
    RunSites = SiteNamespace

MAX_SEED = 2**62
#: What may end a row: a text, a token id, or a sequence of ids.
Stop = Any
_OWN = OWN | {"all_steps", "generated", "generation", "output", "prefill", "so_far", "stacked", "steps", "text"}


class How(TypedDict, total=False):
    """How tokens are generated; see `patchbay.model.Model.generate`."""

    temperature: float | None
    top_p: float | None
    top_k: int | None
    stop: Stop
    eos: bool
    seed: int | None


def check_how(max_new_tokens: object, how: Mapping[str, Any]) -> None:
    """Checks what generation is asked for, in the user's own thread; its ranges are checked with the graph.

    Raises:
        ArgumentError: an argument of another name or type.
    """
    check_names("generate", how, How.__annotations__)
    integer("max_new_tokens", max_new_tokens, least=1)
    for name in ("top_k", "seed"):
        if how.get(name) is not None:
            integer(name, how[name], least=0)
    if (how.get("seed") or 0) >= MAX_SEED:
        raise refused(f"seed is below 2**62, not {seen(how['seed'])}")
    if how.get("temperature") is not None:
        real("temperature", how["temperature"], least=0)
    if (top_p := how.get("top_p")) is not None and not 0 < real("top_p", top_p) <= 1:
        raise refused(f"top_p is a probability above 0, at most 1, not {seen(top_p)}")
    flag("eos", how.get("eos", True))
    stop = how.get("stop") or ()
    if isinstance(stop, (bool, Mapping)) or not (hasattr(stop, "__index__") or isinstance(stop, Iterable)):
        raise refused(f"stop takes texts, token ids and sequences of token ids, not {seen(stop)}")


async def generation_of(core: ModelCore, max_new_tokens: int, how: How) -> Generation:
    """
    Raises:
        TraceError: a stop that is neither text nor token ids.
    """
    texts = stop_texts(how)
    tokens = await core.tokenize([Text(text, special=False) for text in texts])
    return settled(max_new_tokens, how, {text: found.ids for text, found in zip(texts, tokens, strict=True)})


def stop_texts(how: How) -> list[str]:
    """The stops that are texts, which are to be tokenized by themselves."""
    return [each for each in _stops(how) if isinstance(each, str)]


def settled(max_new_tokens: int, how: How, tokens: Mapping[str, tuple[int, ...]]) -> Generation:
    """
    Args:
        max_new_tokens: tokens that each row gets at most.
        how: the rest.
        tokens: of each stop that is a text.

    Raises:
        TraceError: a stop that is neither text nor token ids.
    """
    temperature = float(how.get("temperature") or 0.0)
    seed = how.get("seed")
    if seed is None:
        seed = secrets.randbits(31) if temperature else 0
    top_p = how.get("top_p")
    return Generation(
        max_new_tokens=operator.index(max_new_tokens),
        temperature=temperature,
        top_k=operator.index(how.get("top_k") or 0),
        top_p=1.0 if top_p is None else float(top_p),
        seed=operator.index(seed),
        stop=_stop_ids(how, tokens),
        eos=how.get("eos", True),
    )


def _stops(how: How) -> Sequence[Any]:
    stop = how.get("stop", ())
    single = isinstance(stop, (str, int)) or hasattr(stop, "__index__")
    return [stop] if single else list(stop or ())


def _stop_ids(how: How, tokens: Mapping[str, tuple[int, ...]]) -> tuple[tuple[int, ...], ...]:
    found: list[tuple[int, ...]] = []
    for each in _stops(how):
        if isinstance(each, str):
            found.append(tokens[each])
        elif hasattr(each, "__index__"):
            found.append((operator.index(each),))
        elif isinstance(each, Sequence) and each and all(hasattr(i, "__index__") for i in each):
            found.append(tuple(operator.index(i) for i in each))
        else:
            raise TraceError(f"stop takes texts, token ids and sequences of token ids, not {each!r}")
    if not all(found):
        raise TraceError("a stop of no tokens would end every row at once")
    return tuple(found)


@dataclass(frozen=True)
class Generated:
    """What one row generated.

    Attributes:
        ids: token ids, a stop included where one ended the row.
        strings: the text of each; empty where the model is hosted without a tokenizer.
        text: what they make together, special tokens left out.
    """

    ids: tuple[int, ...]
    strings: tuple[str, ...] = ()
    text: str = ""

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        return f"Generated({self.text!r}, ids={list(self.ids)})" if self.strings else f"Generated(ids={list(self.ids)})"


class StepSites(RunSites):
    """The sites of one forward of a generating run, or of all of them stacked."""

    __slots__ = ()

    def site(self, address: Address) -> Proxy:
        """The value at a site by name, in any spelling of `patchbay.ir.sites`."""
        card = self._trace.builder.card
        site = card.site(canonical(address, card.n_layers)).name
        return read_site(self._trace, self._run_index, site, self._step)

    def module(self, path: str) -> ModuleSites:
        """A module by its path in the checkpoint; its sites are ``.output`` and ``.input``."""
        return module_sites(self._trace, self._run_index, path, self._step)

    @property
    def so_far(self) -> Proxy:
        """Token ids generated before this step, int64 [rows, max_new_tokens]; -1 where there is none."""
        if not isinstance(self._step, int):
            raise TraceError("so_far of all steps is run.stacked(run.so_far)")
        return _tokens(self._trace, self._run_index, self._step)

    def __repr__(self) -> str:
        return f"<step {self._step} of run {self._trace.builder.run_name(self._run_index)}>"


class Steps(Sequence[StepSites]):
    """The forwards of a generating run: 0 the prompt's, k the one that takes generated token k - 1."""

    __slots__ = ("_run",)

    def __init__(self, run: GeneratingRun) -> None:
        self._run = run

    def __len__(self) -> int:
        return self._run.generation.max_new_tokens

    @overload
    def __getitem__(self, index: int) -> StepSites: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[StepSites]: ...

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            raise TraceError("take one step at a time, or run.all_steps for all of them stacked")
        number, count = integer("a step", index), len(self)
        if not -count <= number < count:
            raise IndexOutOfRangeError(
                f"step {number}: the run generates at most {count} tokens, so its steps are 0 to {count - 1}"
            )
        return self._run._at(number % count)

    def __iter__(self) -> Iterator[StepSites]:
        return (self[i] for i in range(len(self)))


class GeneratingRun(Run):
    """A run that goes on after its prompt.

    Its sites are those of every forward: ``run.blocks[2].resid_post += v`` adds at all positions of the prompt and at
    each token that follows; values computed from them are computed anew at every step. Shapes that are shown are those
    of the prompt's forward; later ones have one position. ``run.logits`` is the newest position's, ``[rows, 1, vocab]``
    at every step, and what is written there decides which token comes next.
    """

    __slots__ = ("_final", "_output")

    if TYPE_CHECKING:
        _final: Proxy
        _output: tuple[Generated, ...] | None

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        object.__setattr__(self, "_output", None)
        final = _tokens(self._trace, self._run_index, self.generation.max_new_tokens)
        object.__setattr__(self, "_final", final)

    def _at(self, step: Step) -> StepSites:
        return StepSites(self._trace, self._run_index, self._trace.site_tree, "", step)

    @property
    def generation(self) -> Generation:
        """How it generates, the seed included."""
        how = self._trace.builder.runs[self._run_index].generation
        assert how is not None
        return how

    @property
    def prefill(self) -> StepSites:
        """The prompt's forward."""
        return self._at(0)

    @property
    def steps(self) -> Steps:
        """The forwards, one by one: ``run.steps[0]`` is the prompt's."""
        return Steps(self)

    @property
    def all_steps(self) -> StepSites:
        """Reads the newest position at every step: ``run.all_steps.blocks[2].resid_post`` is [steps, rows, d_model]."""
        return self._at(ALL_STEPS)

    @property
    def so_far(self) -> Proxy:
        """Token ids generated before each step, int64 [rows, max_new_tokens]; -1 where there is none yet."""
        return _tokens(self._trace, self._run_index, None)

    @property
    def generated(self) -> Proxy:
        """Token ids when all is done, int64 [rows, max_new_tokens]; -1 behind a row's last."""
        return self._final

    def logprob(self, text: Any, *, occurrence: int | None = None, append: bool | None = None) -> Proxy:
        """Not of a run that generates, whose logits are those of the newest position alone."""
        del occurrence, append
        raise TraceError(f"make a run of the prompt, t.run(prompt), and ask that for logprob({text!r})")

    def stacked(self, value: Proxy) -> Proxy:
        """The values that `value` has at the steps, along a new first axis; their shapes must be equal.

        Steps that never happened, because every row had stopped, are zero.

        Raises:
            GraphError: when the trace is verified, if the shapes differ: index the newest position, ``[:, -1]``.
        """
        builder = self._trace.builder
        return Proxy(self._trace, builder.add("steps.stack", (lift(self._trace, value),), {}, self._run_index))

    @property
    def output(self) -> Any:
        """What was generated: a `Generated` for a run over one text, a list of them for a list of texts.

        Raises:
            ValueNotReadyError: the trace has not run.
        """
        if self._output is None:
            self._trace.value_of(self._final)
        assert self._output is not None
        return self._output[0] if self._single else list(self._output)

    @property
    def text(self) -> Any:
        """The text that was generated; a list of texts for a list of prompts."""
        output = self.output
        return output.text if isinstance(output, Generated) else [row.text for row in output]

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _OWN:
            raise AttributeError(f"{name} of a run cannot be assigned")
        super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *_OWN})


def _tokens(trace: BaseTrace, run: int, step: int | None) -> Proxy:
    return Proxy(trace, trace.builder.add("run.tokens", (), {} if step is None else {"step": step}, run))


# --- once the trace has run ---------------------------------------------------------------------------------------


def generated_ids(trace: BaseTrace) -> list[list[tuple[int, ...]]]:
    """For every generating run of a trace that has run, the ids of each row."""
    runs = [run for run in trace.runs if isinstance(run, GeneratingRun)]
    return [[tuple(int(i) for i in row if i >= 0) for row in trace.value_of(run.generated)] for run in runs]


async def texts_of(core: ModelCore, runs: list[list[tuple[int, ...]]]) -> list[list[Generated]]:
    """The ids with their texts, where the model has a tokenizer."""
    try:
        return [list(await asyncio.gather(*(_text_of(core, row) for row in rows))) for rows in runs]
    except InvalidRequestError:
        return [[Generated(row) for row in rows] for rows in runs]


async def _text_of(core: ModelCore, ids: tuple[int, ...]) -> Generated:
    row = await core.decode(ids)
    return Generated(ids, row.strings, row.text)


def take_generated(trace: BaseTrace, generated: list[list[Generated]]) -> None:
    """Give every generating run its output; warn of steps that were asked for and never came."""
    runs = [run for run in trace.runs if isinstance(run, GeneratingRun)]
    for run, rows in zip(runs, generated, strict=True):
        object.__setattr__(run, "_output", tuple(rows))
        made = max(map(len, rows))
        # Tokens so far are what they are, whether or not their step came: streaming asks for those of every step.
        visits = ("site.read", "site.write")
        steps = [n.attrs.get("step") for n in trace.builder.nodes if n.run == run.index and n.op in visits]
        late = sorted({s for s in steps if isinstance(s, int) and made <= s < run.generation.max_new_tokens})
        if late:
            warnings.warn(
                f"run {run.label!r} stopped after {made} tokens: steps {', '.join(map(str, late))} never happened; "
                "what they read is zero, all other values are kept",
                stacklevel=4,
            )


def streaming(
    run: GeneratingRun, deliver: Callable[[int, list[int]], Any], others: Callable[[Event], Any] | None
) -> Callable[[Event], None]:
    """Ask for every token as it appears, and make what hands it to `deliver` from the events of the execution.

    Args:
        run: the run.
        deliver: called with the step and one id per row, -1 for rows that had stopped.
        others: called with every event.
    """
    trace, names = run.trace, {}
    for step in range(run.generation.max_new_tokens):
        token = _tokens(trace, run.index, step + 1)[:, step]
        names[trace.want(token, f"run{run.index}.token.{step}")] = step

    def on_event(event: Event) -> None:
        if others is not None:
            others(event)
        if isinstance(event, TensorValue) and event.name in names:
            ids = to_array(event.value).tolist()
            if any(i >= 0 for i in ids):
                deliver(names[event.name], ids)

    return on_event
