"""The calls as messages, shared by every transport: requests from IR objects, and answers back to them."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator, Sequence

from patchbay.errors import PatchbayError, ProtocolError, RequestRangeError
from patchbay.ir.artifacts import ArtifactInfo
from patchbay.ir.card import ModelCard
from patchbay.ir.events import ChatMessage, ExecuteOptions, ModelSummary, TokenizedRow
from patchbay.ir.graph import Graph
from patchbay.v1 import artifact_pb2, service_pb2, tensor_pb2
from patchbay.wire.artifacts import decode_artifact, encode_digest
from patchbay.wire.cards import decode_card, decode_summary
from patchbay.wire.events import encode_options
from patchbay.wire.graphs import encode_graph
from patchbay.wire.names import encode_model
from patchbay.wire.tokens import decode_row

#: Full name of the service, as in ``/patchbay.v1.PatchbayService/Execute``.
SERVICE = service_pb2.DESCRIPTOR.services_by_name["PatchbayService"].full_name
#: Pages of ListModels that a client follows before it calls the server broken.
MAX_PAGES = 1_000


def get_model_request(name: str) -> service_pb2.GetModelRequest:
    return service_pb2.GetModelRequest(name=encode_model(name))


def read_card(response: service_pb2.GetModelResponse) -> ModelCard:
    return decode_card(response.card)


def read_summaries(response: service_pb2.ListModelsResponse, before: int) -> list[ModelSummary]:
    return [decode_summary(m, f"models[{before + i}]") for i, m in enumerate(response.models)]


def tokenize_request(
    model: str, texts: Sequence[str], add_special_tokens: bool, prepend_bos: bool | None = None
) -> service_pb2.TokenizeRequest:
    """
    Raises:
        ProtocolError: a text that UTF-8 cannot carry.
    """
    try:
        request = service_pb2.TokenizeRequest(
            model=encode_model(model), texts=list(texts), omit_special_tokens=not add_special_tokens
        )
    except UnicodeError:
        raise ProtocolError("a text holds lone surrogates, which UTF-8 cannot carry", field="texts") from None
    if prepend_bos is not None:
        request.prepend_bos = prepend_bos
    return request


def token_strings_request(model: str, ids: Sequence[int]) -> service_pb2.TokenizeRequest:
    """
    Raises:
        RequestRangeError: an id of more than 64 bits.
    """
    try:
        return service_pb2.TokenizeRequest(model=encode_model(model), ids=ids)
    except (OverflowError, TypeError, ValueError) as error:
        if isinstance(error, PatchbayError):
            raise
        raise RequestRangeError(f"not token ids: {error}", reason="INVALID_TOKEN_ID") from None


def render_request(model: str, chats: Sequence[Sequence[ChatMessage]]) -> service_pb2.TokenizeRequest:
    """
    Raises:
        ProtocolError: a message that UTF-8 cannot carry.
    """
    try:
        conversations = [
            service_pb2.Conversation(
                messages=[service_pb2.ChatMessage(role=m.role, content=m.content) for m in messages]
            )
            for messages in chats
        ]
    except UnicodeError:
        raise ProtocolError("a message with lone surrogates, which UTF-8 cannot carry", field="conversations") from None
    return service_pb2.TokenizeRequest(model=encode_model(model), conversations=conversations)


def read_rendered(response: service_pb2.TokenizeResponse, expected: int) -> tuple[str, ...]:
    """
    Raises:
        ProtocolError: not one text per conversation.
    """
    if len(response.rendered) != expected:
        raise ProtocolError(f"{len(response.rendered)} texts for {expected} conversations", field="rendered")
    return tuple(response.rendered)


def read_rows(response: service_pb2.TokenizeResponse, expected: int) -> tuple[TokenizedRow, ...]:
    """
    Raises:
        ProtocolError: not one row per text.
    """
    if len(response.texts) != expected:
        raise ProtocolError(f"{len(response.texts)} tokenized texts for {expected} texts", field="texts")
    return tuple(decode_row(row, f"texts[{index}]") for index, row in enumerate(response.texts))


#: Names of one StatArtifacts call.
MAX_NAMES = 1_024


def stat_requests(digests: Sequence[str]) -> Iterator[artifact_pb2.StatArtifactsRequest]:
    names = [encode_digest(digest) for digest in digests]
    for start in range(0, len(names), MAX_NAMES):
        yield artifact_pb2.StatArtifactsRequest(names=names[start : start + MAX_NAMES])


def read_artifacts(artifacts: Iterable[artifact_pb2.Artifact]) -> list[ArtifactInfo]:
    return [decode_artifact(artifact, f"artifacts[{i}]") for i, artifact in enumerate(artifacts)]


def read_put(response: artifact_pb2.PutArtifactResponse, wanted: ArtifactInfo) -> ArtifactInfo:
    """
    Raises:
        ProtocolError: the server stored something else.
    """
    info = decode_artifact(response.artifact, "artifact")
    if (info.digest, info.dtype, info.shape) != (wanted.digest, wanted.dtype, wanted.shape):
        raise ProtocolError(f"the server stored {info.digest}, not {wanted.digest}", field="artifact")
    return info


def execute_request(
    model: str, graph: Graph, options: ExecuteOptions, *, compress: bool = False
) -> service_pb2.ExecuteRequest:
    """A request with an id of its own, to be kept when it is sent again; `compress`: large results may be."""
    request = service_pb2.ExecuteRequest(
        model=encode_model(model),
        graph=encode_graph(graph),
        options=encode_options(options),
        request_id=str(uuid.uuid4()),
    )
    if compress:
        request.options.accepted_compressions.append(tensor_pb2.COMPRESSION_SHUFFLE_ZSTD)
    return request
