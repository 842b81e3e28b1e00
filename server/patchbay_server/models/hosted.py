"""A model that is ready to be experimented on: the module, its tokenizer, its card and the taps behind every site."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from patchbay.errors import InvalidRequestError, RequestRangeError
from patchbay.ir.card import ModelCard
from patchbay.ir.events import ChatMessage, ModelSummary, TokenizedRow
from patchbay.ir.limits import Limits
from patchbay.ir.params import NONE
from patchbay_server.models.activations import Activation
from patchbay_server.models.compiling import CompiledLayers
from patchbay_server.models.continuation import Continuation
from patchbay_server.models.inputs import Extents, ModelInputs, forward
from patchbay_server.models.narrowing import Unembedding
from patchbay_server.models.parameters import Parameter
from patchbay_server.models.products import Products
from patchbay_server.models.taps import Tap


@dataclass
class HostedModel:
    """A model behind a card.

    Attributes:
        model: the transformers module, in eval mode, on its device, using Patchbay's attention function.
        tokenizer: its tokenizer, or None.
        card: what clients see.
        taps: the way to every site that the card offers, by name.
        layers: paths of the decoder layers, in order.
        callables: the modules that ``call`` may apply, by name; each maps ``[..., d_in]`` to ``[..., d_out]``.
        proofs: for every canonical site, what was checked at load and what came out, in words.
        parameters: the way to every weight that the card names.
        compiled: its layers as torch compiled them, where the operator asked for that.
        row_independent: whether rows of different requests may share a forward, as proved at load.
        decodes_together: whether rows that generate may join and leave one batch at every step, as proved at load.
        continuation: how forwards go on from earlier ones, as proved at load; None where they do not.
        unembedding: what makes the logits, where it was seen to make those of some positions alone.
        products: the modules whose products another library does faster, as measured at load; None for none.
        activations: the modules that one kernel of torch's does.
    """

    model: torch.nn.Module
    tokenizer: Any
    card: ModelCard
    taps: Mapping[str, Tap]
    layers: tuple[str, ...]
    callables: Mapping[str, Callable[[torch.Tensor], torch.Tensor]]
    proofs: Mapping[str, str]
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    compiled: CompiledLayers | None = None
    row_independent: bool = False
    decodes_together: bool = False
    continuation: Continuation | None = None
    unembedding: Unembedding | None = None
    products: Products | None = None
    activations: tuple[Activation, ...] = ()
    _tokenizer_lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def continues(self) -> bool:
        """Whether a forward may start at a later layer and position, against an earlier one's keys and values."""
        return self.continuation is not None

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def summary(self) -> ModelSummary:
        card = self.card
        return ModelSummary(card.name, card.family, card.source, card.n_params, card.n_layers, card.d_model)

    def with_limits(self, limits: Limits) -> HostedModel:
        """The same model, its card announcing `limits`."""
        return replace(self, card=replace(self.card, limits=limits))

    def with_weights(self, policy: str) -> HostedModel:
        """The same model, its card announcing what graphs may do with its weights (`patchbay.ir.params.POLICIES`)."""
        params = () if policy == NONE else self.card.params
        return replace(self, card=replace(self.card, weights=policy, params=params))

    def with_compiled_layers(self, backend: str = "inductor") -> HostedModel:
        """The same model, its layers compiled by torch for forwards that look at nothing inside them.

        Compiling takes from seconds to minutes, and happens here.
        """
        compiled = CompiledLayers(self.model, self.layers, backend=backend)
        inputs = ModelInputs(self.model)

        def made_up(rows: int, seq: int) -> None:
            forward(self.model, inputs.probe(Extents(rows, seq, seq)))

        compiled.warm(made_up)
        return replace(self, compiled=compiled)

    def tokenize(
        self, texts: Sequence[str], *, add_special_tokens: bool = True, prepend_bos: bool | None = None
    ) -> tuple[TokenizedRow, ...]:
        """Token ids, strings and character offsets of each text.

        Args:
            texts: the texts.
            add_special_tokens: whether the tokenizer adds what it adds by itself.
            prepend_bos: whether each row begins with one beginning-of-sequence token, whatever the tokenizer does by
                itself; None leaves it to the tokenizer.

        Raises:
            InvalidRequestError: the model has no tokenizer, or its tokenizer knows no such token.
        """
        if self.tokenizer is None:
            raise InvalidRequestError(
                f"{self.card.name!r} is hosted without a tokenizer: give token ids instead of text"
            )
        with self._tokenizer_lock:  # the fast tokenizers' padding state is not safe to share between threads
            rows = tuple(self._tokenize_one(text, add_special_tokens) for text in texts)
        return rows if prepend_bos is None else tuple(self._with_bos(row, prepend_bos) for row in rows)

    def _with_bos(self, row: TokenizedRow, wanted: bool) -> TokenizedRow:
        bos = self.tokenizer.bos_token_id
        if bos is None:  # BERT and its kin begin with a token of their own name
            bos = self.tokenizer.cls_token_id
        if bos is None:
            raise InvalidRequestError(
                f"the tokenizer of {self.card.name!r} knows no beginning-of-sequence token; leave prepend_bos out"
            )
        if (row.ids[:1] == (bos,)) is wanted:
            return row
        if wanted:
            shown = self.tokenizer.decode([bos])
            return TokenizedRow((bos, *row.ids), (shown, *row.strings), ((0, 0), *row.offsets), (True, *row.special))
        return TokenizedRow(row.ids[1:], row.strings[1:], row.offsets[1:], row.special[1:])

    def render_chats(self, chats: Sequence[Sequence[ChatMessage]]) -> tuple[str, ...]:
        """Each conversation as a text, by the tokenizer's chat template, special tokens written out.

        A conversation that does not end with the assistant is followed by what opens the assistant's turn.

        Raises:
            InvalidRequestError: the tokenizer has no chat template, or its template refuses the messages.
        """
        if not getattr(self.tokenizer, "chat_template", None):
            raise InvalidRequestError(
                f"{self.card.name!r} has no chat template; give a text that is already in the form the model wants"
            )
        texts = []
        for messages in chats:
            plain = [{"role": m.role, "content": m.content} for m in messages]
            answered = bool(messages) and messages[-1].role == "assistant"
            try:
                with self._tokenizer_lock:
                    text = self.tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=not answered)
            except Exception as error:  # templates are programs of the model's authors: they raise what they like
                reason = str(error).partition("\n")[0]
                raise InvalidRequestError(f"the chat template refuses these messages: {reason}") from error
            texts.append(str(text))
        return tuple(texts)

    def token_strings(self, ids: Sequence[int]) -> TokenizedRow:
        """The text of each token id, and of all together; offsets are all (0, 0).

        Raises:
            InvalidRequestError: the model has no tokenizer.
            RequestRangeError: an id outside the vocabulary.
        """
        if self.tokenizer is None:
            raise InvalidRequestError(f"{self.card.name!r} is hosted without a tokenizer: its ids have no text")
        for i in ids:
            if not 0 <= i < self.card.d_vocab:
                raise RequestRangeError(
                    f"token id {i} is outside the vocabulary of {self.card.name!r}: 0 to {self.card.d_vocab - 1}"
                )
        special = frozenset(self.tokenizer.all_special_ids)
        with self._tokenizer_lock:
            known = {i: self.tokenizer.decode([i]) for i in set(ids)}
            text = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        shown = tuple(known[i] for i in ids)
        return TokenizedRow(tuple(ids), shown, ((0, 0),) * len(ids), tuple(i in special for i in ids), text)

    def _tokenize_one(self, text: str, add_special_tokens: bool) -> TokenizedRow:
        fast = bool(getattr(self.tokenizer, "is_fast", False))
        encoded = self.tokenizer(
            text,
            add_special_tokens=add_special_tokens,
            return_special_tokens_mask=True,
            return_offsets_mapping=fast,
            return_attention_mask=False,
            truncation=False,
        )
        ids = tuple(int(i) for i in encoded["input_ids"])
        strings = tuple(self.tokenizer.decode([i]) for i in ids)
        offsets = tuple((int(a), int(b)) for a, b in encoded["offset_mapping"]) if fast else ((0, 0),) * len(ids)
        special = tuple(bool(s) for s in encoded["special_tokens_mask"])
        return TokenizedRow(ids, strings, offsets, special)


def weights_digest(model: torch.nn.Module, *, full_below_bytes: int = 2**30) -> str:
    """A digest of a model's weights: of every byte for small models, of a strided sample for large ones."""
    digest = hashlib.sha256()
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    stride = max(1, total // full_below_bytes)
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name}:{tuple(parameter.shape)}:{parameter.dtype};".encode())
        flat = parameter.detach().reshape(-1)[::stride].contiguous().cpu()
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
