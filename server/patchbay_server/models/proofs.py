"""Whether the derived sites are what their names say: identities checked on random inputs when a model is loaded.

Every identity is checked twice. On a plain forward it tells that the values are the right ones. Then each site is
written (its rows change places, in all layers at once, each layer still being given what it was given before), and
the identities that start from it must hold between the written value and what the model makes of it; that tells that
writing has exactly the effect that the site's name promises. A site that fails, or that no identity reaches, is taken
off the card with the reason; one that reads rightly but cannot be written is marked so.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from patchbay_server.models.binding import Binding, close
from patchbay_server.models.checks import Check, Identity, Values
from patchbay_server.models.identities import identities, joints
from patchbay_server.models.inputs import forward
from patchbay_server.models.taps import Handle, Tap


@dataclass
class Proof:
    """Outcome of the checks.

    Attributes:
        proved: the identities that held, in words, by site.
        failed: the identity that did not hold, by site.
        read_only: why a site that reads rightly cannot be written, by site.
        order: position of every tapped site in the forward, from 0.
        forwards: how many forwards the proof took.
    """

    proved: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    read_only: dict[str, str] = field(default_factory=dict)
    order: dict[str, int] = field(default_factory=dict)
    forwards: int = 0

    def judge(self, holds: bool, sentence: str, *names: str) -> None:
        """Record for each of `names` that `sentence` held or not; one failure outweighs any success."""
        for name in names:
            if not holds:
                self.failed.setdefault(name, sentence)
            elif sentence not in self.proved.setdefault(name, sentence).split("; "):
                self.proved[name] += f"; {sentence}"


def read_all(
    model: torch.nn.Module, taps: Mapping[str, Tap], inputs: Mapping[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Every tap's value in one forward, in the order reached, and the forward's output."""
    return write_and_read(model, taps, inputs, {})


def write_and_read(
    model: torch.nn.Module,
    taps: Mapping[str, Tap],
    inputs: Mapping[str, torch.Tensor],
    writes: Mapping[str, torch.Tensor],
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Every tap's value in one forward in which some are replaced (and then read as written), and the output."""
    values: dict[str, torch.Tensor] = {}

    def handler(name: str) -> Callable[[torch.Tensor], torch.Tensor | None]:
        def act(value: torch.Tensor) -> torch.Tensor | None:
            new = writes.get(name)
            values[name] = value.clone() if new is None else new
            return None if new is None else new.clone()  # the model may go on in place

        return act

    handles: list[Handle] = []
    try:
        for name, tap in taps.items():
            handles.append(tap.attach(model, handler(name), writes=name in writes))
        with torch.no_grad():
            return values, forward(model, inputs)
    finally:
        for handle in handles:
            handle.remove()


def prove(model: torch.nn.Module, binding: Binding, inputs: Mapping[str, torch.Tensor]) -> Proof:
    """Check every identity of `binding` on `inputs`, and that each write has the effect it should."""
    proof = Proof()
    taps = {name: site.tap for name, site in binding.sites.items()}
    with torch.no_grad():
        plain = forward(model, inputs)
        again = forward(model, inputs)
    if not torch.equal(plain, again):
        for name in taps:
            proof.failed[name] = "the model's forward is random: two on the same input differ"
        return proof
    values, tapped = read_all(model, taps, inputs)
    proof.order = {name: i for i, name in enumerate(values)}
    proof.forwards = 3
    if not torch.equal(plain, tapped):
        _blame_readers(model, taps, inputs, plain, proof)
    for name in taps:
        if name not in values:
            proof.failed.setdefault(name, "the forward never reaches it")
    checks = [i for i in identities(model, binding, values, inputs) if all(n in values for n in i.names)]
    for identity in checks:
        if identity.plain:
            proof.judge(_holds(identity, Check(values, values, frozenset())), identity.sentence, *identity.names)
    _prove_writes(model, binding, inputs, values, plain, checks, proof)
    _prove_joints(model, binding, inputs, values, proof)
    for name in taps:
        if name not in proof.proved:
            proof.failed.setdefault(name, "no identity reaches it")
    return proof


def _blame_readers(
    model: torch.nn.Module,
    taps: Mapping[str, Tap],
    inputs: Mapping[str, torch.Tensor],
    plain: torch.Tensor,
    proof: Proof,
) -> None:
    """Fail the sites whose reading alone changes the output."""
    for name, tap in taps.items():
        proof.forwards += 1
        if not torch.equal(read_all(model, {name: tap}, inputs)[1], plain):
            proof.failed[name] = "reading it changes the output"


def kind_of(name: str) -> str:
    """A site's name with the block left open: what the same site of all layers has in common."""
    return re.sub(r"\bblocks\.\d+\.", "blocks.*.", name)


def other(value: torch.Tensor) -> torch.Tensor:
    """A value of the same kind that differs: rows change places, or where all rows are alike, all is scaled."""
    rolled = value.roll(1, 0)
    return value * 0.75 if torch.equal(rolled, value) else rolled


def _prove_writes(
    model: torch.nn.Module,
    binding: Binding,
    inputs: Mapping[str, torch.Tensor],
    values: Values,
    plain: torch.Tensor,
    checks: list[Identity],
    proof: Proof,
) -> None:
    kinds: dict[str, list[str]] = {}
    for name, site in binding.sites.items():
        if name in values and name not in proof.failed and not site.read_only:
            kinds.setdefault(kind_of(name), []).append(name)
    streams = {f"{shape.prefix}.resid_pre" for shape in binding.blocks}
    for kind, names in kinds.items():
        writes = {name: other(values[name]) for name in names}
        crosses_layers = kind.endswith(("resid_post", "resid_pre")) or "blocks.*." not in kind
        forced = {} if crosses_layers else {n: values[n] for n in streams if n in values}
        taps = {n: binding.sites[n].tap for n in values if n in binding.sites}
        try:
            after, output = write_and_read(model, taps, inputs, {**forced, **writes})
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            for name in names:
                proof.read_only[name] = f"the model does not take another value here: {str(error).splitlines()[0]}"
            continue
        proof.forwards += 1
        check = Check(after, values, frozenset(writes))
        reaches = not torch.equal(output, plain)
        reaches |= any(n in after and n not in writes and not torch.equal(after[n], values[n]) for n in values)
        for name in names:
            _judge_write(name, check, checks, reaches, proof)


def _prove_joints(
    model: torch.nn.Module, binding: Binding, inputs: Mapping[str, torch.Tensor], values: Values, proof: Proof
) -> None:
    streams = {n: values[n] for shape in binding.blocks if (n := f"{shape.prefix}.resid_pre") in values}
    for together in joints(binding, values):
        good = [j for j in together if not any(n in proof.failed or n in proof.read_only for n in j.writes)]
        writes = {name: value for joint in good for name, value in joint.writes.items()}
        if not writes:
            continue
        taps = {n: binding.sites[n].tap for n in values if n in binding.sites}
        after, _ = write_and_read(model, taps, inputs, {**streams, **writes})
        proof.forwards += 1
        for joint in good:
            if joint.holds(after):
                proof.judge(True, joint.sentence, *joint.names)
            elif joint.needed:
                proof.judge(False, joint.sentence, *(n for n in joint.names if not n.endswith("post")))


def _judge_write(name: str, check: Check, checks: list[Identity], reaches: bool, proof: Proof) -> None:
    starting = [i for i in checks if name in i.sources and all(n in check.now for n in i.names)]
    broken = next((i for i in starting if not _holds(i, check)), None)
    for identity in starting:
        if not identity.plain and _holds(identity, check):
            proof.judge(True, identity.sentence, *identity.names)
    if broken is not None and broken.essential:
        proof.failed[name] = broken.sentence
    elif broken is not None:
        proof.read_only[name] = f"writing it was seen to break an identity: {broken.sentence}"
    elif not starting and not reaches:
        proof.read_only[name] = "writing it was seen to change nothing"
    elif starting:
        proof.judge(True, "holds under writes too", name)
    elif name in proof.proved:
        proof.judge(True, "a written value changes the output", name)


def _holds(identity: Identity, check: Check) -> bool:
    """Whether an identity holds; values whose shapes do not even fit together break it."""
    try:
        return identity.holds(check)
    except (RuntimeError, ValueError, IndexError):
        return False


__all__ = ["Proof", "close", "prove", "read_all", "write_and_read"]
