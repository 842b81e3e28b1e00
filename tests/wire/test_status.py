"""What the server raises is what the client raises."""

from __future__ import annotations

from urllib.parse import quote

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from patchbay.errors import (
    GRAPH_ERROR_BY_REASON,
    SERVICE_ERROR_BY_CODE,
    CausalityError,
    GraphError,
    LimitExceededError,
    PatchbayError,
    ProtocolError,
    ResourceExhaustedError,
    ServiceError,
    ShapeError,
    UnavailableError,
    UnknownServerError,
    UnknownSiteError,
)
from patchbay.wire.status import (
    CODES,
    MAX_DETAILS_BYTES,
    MAX_METADATA_BYTES,
    cut,
    decode_status,
    encode_status,
    service_error,
    shorten,
)


def _all_subclasses(root: type) -> set[type]:
    return {root}.union(*(_all_subclasses(cls) for cls in root.__subclasses__()))


def test_every_status_code_has_an_exception() -> None:
    """The one table is total over gRPC's codes but OK, and each class carries its own code."""
    names = {code.name for code in grpc.StatusCode} - {"OK"}
    assert set(SERVICE_ERROR_BY_CODE) == names
    assert all(cls.code == name for name, cls in SERVICE_ERROR_BY_CODE.items())
    assert set(SERVICE_ERROR_BY_CODE.values()) == _all_subclasses(ServiceError) - {ServiceError}
    assert {code.name: code.value[0] for code in grpc.StatusCode} == dict(CODES)


def test_every_graph_error_has_a_reason() -> None:
    """Each class of graph error has its own name on the wire, but those that only the client's own code raises."""
    shared = {cls for cls in _all_subclasses(GraphError) if cls.__module__ == GraphError.__module__}
    assert set(GRAPH_ERROR_BY_REASON.values()) == shared


def test_no_exception_is_a_transport_librarys() -> None:
    """None of our exceptions derives from grpc's."""
    for cls in _all_subclasses(PatchbayError):
        assert not any(base.__module__.partition(".")[0] == "grpc" for base in cls.__mro__)


@pytest.mark.parametrize("cls", GRAPH_ERROR_BY_REASON.values())
def test_graph_errors(cls: type[GraphError]) -> None:
    """A graph error arrives as its own class, with node, related nodes and field."""
    error = cls("no good: é", node=17, related=(3, 5), field="nodes[17].args[1]")
    back = decode_status(encode_status(error).SerializeToString())
    assert type(back) is cls
    assert isinstance(back, GraphError)
    assert (back.message, back.node, back.related, back.field) == (error.message, 17, (3, 5), "nodes[17].args[1]")


def test_limits_and_suggestions() -> None:
    """A limit arrives with its name and numbers, an unknown site with what is near."""
    limit = decode_status(
        encode_status(LimitExceededError("many", limit="max_nodes", allowed=5, requested=10**20)).SerializeToString()
    )
    assert isinstance(limit, LimitExceededError)
    assert (limit.limit, limit.allowed, limit.requested) == ("max_nodes", 5, 10**20)
    site = decode_status(encode_status(UnknownSiteError("?", suggestions=("a", "b,c"))).SerializeToString())
    assert isinstance(site, UnknownSiteError)
    assert site.suggestions == ("a", "b,c")


@pytest.mark.parametrize("cls", SERVICE_ERROR_BY_CODE.values())
def test_service_errors(cls: type[ServiceError]) -> None:
    """A service error arrives as its own class, with reason, facts and the time to wait."""
    error = cls("no", reason="WHY", metadata={"limit": "x"}, retry_after_s=1.5)
    back = decode_status(encode_status(error).SerializeToString())
    assert type(back) is cls
    assert isinstance(back, ServiceError)
    assert (back.message, back.reason, back.metadata, back.retry_after_s) == ("no", "WHY", {"limit": "x"}, 1.5)


def test_protocol_errors() -> None:
    """A protocol error arrives as one, with its field."""
    back = decode_status(encode_status(ProtocolError("bad", field="model")).SerializeToString())
    assert isinstance(back, ProtocolError)
    assert (back.message, back.field) == ("bad", "model")


def test_google_rpc_details() -> None:
    """Other clients find BadRequest, QuotaFailure and RetryInfo where google.rpc says."""
    status = encode_status(ShapeError("no", node=17, field="nodes[17].args[1]"))
    bad = error_details_pb2.BadRequest()
    assert status.code == CODES["INVALID_ARGUMENT"]
    assert any(detail.Unpack(bad) for detail in status.details)
    assert bad.field_violations[0].field == "graph.nodes[17].args[1]"
    status = encode_status(ResourceExhaustedError("full", retry_after_s=0.25, metadata={"subject": "account:ada"}))
    quota, retry = error_details_pb2.QuotaFailure(), error_details_pb2.RetryInfo()
    assert any(detail.Unpack(quota) for detail in status.details)
    assert any(detail.Unpack(retry) for detail in status.details)
    assert quota.violations[0].subject == "account:ada"
    assert retry.retry_delay.ToMilliseconds() == 250


def test_long_errors_are_cut_for_headers_and_keep_what_matters() -> None:
    """An error too long for a header keeps its class, node and field there."""
    error = CausalityError("x" * 20_000, node=7, related=tuple(range(2_000)), field="nodes[7]")
    status = encode_status(error)
    short = shorten(status)
    assert status.ByteSize() > 8_192
    assert short.ByteSize() <= MAX_METADATA_BYTES
    back = decode_status(short.SerializeToString())
    assert isinstance(back, CausalityError)
    assert (back.node, back.field) == (7, "nodes[7]")


@pytest.mark.parametrize("error", [GraphError("\U0001f40d" * 5_000, field="é" * 5_000), UnavailableError("é" * 9_000)])
def test_cut_errors_fit_whatever_the_alphabet(error: PatchbayError) -> None:
    """The limit on a header counts bytes, not characters."""
    status = encode_status(error)
    assert shorten(status).ByteSize() <= MAX_METADATA_BYTES
    assert len(quote(cut(status.message), safe=" ")) <= MAX_DETAILS_BYTES + 3


def test_lone_surrogates_in_a_message_do_not_break_the_error() -> None:
    """An error that quotes broken text is still sendable."""
    assert decode_status(encode_status(GraphError("\ud800", field="\udfff")).SerializeToString()).args == ("?",)


@pytest.mark.parametrize(
    "metadata",
    [
        {"node": "x", "related": "1,,b,2", "allowed": "9" * 5_000, "suggestions": "[" * 100_000},
        {"node": "١", "related": "-1", "suggestions": '{"a": 1}', "requested": "1_000"},
    ],
)
def test_hostile_details_do_no_harm(metadata: dict[str, str]) -> None:
    """Numbers and lists that are none are left out; the error itself still arrives."""
    for reason in ("LIMIT_EXCEEDED", "UNKNOWN_SITE"):
        status = status_pb2.Status(code=3, message="m")
        info = error_details_pb2.ErrorInfo(reason=reason, domain="patchbay", metadata=metadata)
        status.details.add().Pack(info)
        back = decode_status(status.SerializeToString())
        assert type(back) is GRAPH_ERROR_BY_REASON[reason]
        assert back.node is None


@pytest.mark.parametrize("data", [b"\xff\xff", b"\x1a\x02\xff\xff", bytes(2**20 + 1)])
def test_unreadable_details(data: bytes) -> None:
    """Details that are no google.rpc.Status become a ProtocolError."""
    assert isinstance(decode_status(data), ProtocolError)


def test_unknown_codes_become_the_plainest_error() -> None:
    """A code or a domain that this version does not know becomes a plain service error."""
    assert isinstance(service_error("MADE_UP", "m"), UnknownServerError)
    assert isinstance(decode_status(status_pb2.Status(code=99, message="m").SerializeToString()), UnknownServerError)
    foreign = status_pb2.Status(code=14, message="m")
    foreign.details.add().Pack(error_details_pb2.ErrorInfo(reason="SHAPE_MISMATCH", domain="elsewhere"))
    assert isinstance(decode_status(foreign.SerializeToString()), UnavailableError)
