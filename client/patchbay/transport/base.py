"""What the client needs of a way to a server: IR objects in, IR objects and Patchbay's own exceptions out."""

from __future__ import annotations

import abc
from collections.abc import AsyncIterator, Sequence

from patchbay.ir.artifacts import ArtifactInfo
from patchbay.ir.card import ModelCard
from patchbay.ir.events import ChatMessage, Event, ExecuteOptions, ModelSummary, TokenizedRow
from patchbay.ir.graph import Graph, TensorData


class Transport(abc.ABC):
    """A way to a server; used from one event loop.

    Every method raises `PatchbayError`s only: `ServiceError` for what the server or the way to it refused, `GraphError`
    for what is wrong with a graph, `ProtocolError` for answers that cannot be understood.

    Attributes:
        bytes_sent: payload bytes of all requests so far.
        bytes_received: payload bytes of all answers so far.
    """

    bytes_sent: int = 0
    bytes_received: int = 0

    @abc.abstractmethod
    async def list_models(self) -> tuple[ModelSummary, ...]:
        """The models that the server hosts, ordered by name."""

    @abc.abstractmethod
    async def get_model(self, name: str) -> ModelCard:
        """The card of the model called `name`.

        Raises:
            NotFoundError: there is none.
        """

    @abc.abstractmethod
    async def tokenize(
        self, model: str, texts: Sequence[str], *, add_special_tokens: bool = True, prepend_bos: bool | None = None
    ) -> tuple[TokenizedRow, ...]:
        """Tokenize texts with the tokenizer of `model`; one row per text, in order.

        Args:
            model: name of the model.
            texts: the texts.
            add_special_tokens: whether the tokenizer adds what it adds by itself.
            prepend_bos: whether each row begins with the beginning-of-sequence token; None leaves it to the tokenizer.

        Raises:
            InvalidRequestError: the model has no tokenizer, or it knows no such token.
        """

    @abc.abstractmethod
    async def render_chats(self, model: str, chats: Sequence[Sequence[ChatMessage]]) -> tuple[str, ...]:
        """Texts of conversations, made by the chat template of the model's tokenizer, special tokens written out.

        Raises:
            InvalidRequestError: the model's tokenizer has no chat template, or the template refuses the messages.
        """

    @abc.abstractmethod
    async def token_strings(self, model: str, ids: Sequence[int]) -> TokenizedRow:
        """The text of each token id, as the tokenizer of `model` shows it; offsets are all (0, 0).

        Raises:
            RequestRangeError: an id outside the vocabulary.
        """

    @abc.abstractmethod
    def execute(
        self, model: str, graph: Graph, options: ExecuteOptions, *, timeout_s: float | None = None
    ) -> AsyncIterator[Event]:
        """Run a graph. Closing the iterator, or cancelling the task that iterates, cancels the call.

        Args:
            model: name of the model.
            graph: what to run.
            options: how.
            timeout_s: seconds until the call is given up; None waits as long as the server does.
        """

    @abc.abstractmethod
    async def put_artifact(
        self,
        info: ArtifactInfo,
        tensor: TensorData,
        *,
        automatic: bool = False,
        known: bool = False,
        model: str | None = None,
    ) -> ArtifactInfo:
        """Store a tensor under its digest.

        Args:
            info: its digest, form and name.
            tensor: its elements; not copied.
            automatic: on behalf of a graph: the server may drop it where room is short.
            known: the server has it: send nothing but what it is to be called.
            model: name of the model whose replica should take it; None: whichever part of the service answers.

        Raises:
            ResourceExhaustedError: too large, beyond the quota, or the disk is full.
            ProtocolError: it was said to be there, and is not.
            UnsupportedError: the server keeps no artifacts.
        """

    @abc.abstractmethod
    async def get_artifact(self, digest: str, *, model: str | None = None) -> tuple[ArtifactInfo, TensorData]:
        """A tensor of the caller's.

        Raises:
            NotFoundError: the caller has none of that digest.
        """

    @abc.abstractmethod
    async def stat_artifacts(self, digests: Sequence[str], *, model: str | None = None) -> tuple[ArtifactInfo, ...]:
        """Those of `digests` that the caller has, in order; asking counts as use."""

    @abc.abstractmethod
    async def list_artifacts(self) -> tuple[ArtifactInfo, ...]:
        """All that the caller has, ordered by digest."""

    @abc.abstractmethod
    async def delete_artifact(self, digest: str) -> None:
        """Remove one.

        Raises:
            NotFoundError: the caller has none of that digest.
        """

    @abc.abstractmethod
    async def close(self) -> None:
        """Let go of the connection. Calls after it fail; closing twice does not."""
