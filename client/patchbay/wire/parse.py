"""Bytes to protobuf messages, at a bounded price.

A protobuf parser builds an object for every submessage, so two bytes on the wire may become a hundred in memory: 4 MB
of empty nodes take over 100 MB. Large messages are therefore walked once without building anything, and what they would
take is added up, before the parser sees them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Literal, TypeAlias, TypeVar, cast

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import DecodeError, Message

from patchbay.errors import LimitExceededError, ProtocolError

M = TypeVar("M", bound=Message)

#: Messages up to this many bytes are parsed without a walk: they become 20 MB at the very most.
UNCHECKED_BYTES = 256 * 2**10
#: What parsed messages may take, unless the caller says otherwise.
MAX_PARSED_BYTES = 128 * 2**20

# What upb spends, rounded up; tests/wire/test_parse.py compares the sum with the memory that parsing really takes.
_MESSAGE_COST = 96
_STRING_COST = 64
_NUMBER_COST = 8

_Kind: TypeAlias = "Descriptor | Literal['string', 'packed']"


@cache
def _length_delimited_fields(descriptor: Descriptor) -> Mapping[int, _Kind]:
    table: dict[int, _Kind] = {}
    for field in descriptor.fields:
        if field.message_type is not None:
            table[field.number] = field.message_type
        elif field.type in (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES):
            table[field.number] = "string"
        else:
            table[field.number] = "packed"
    return table


def _varint(data: bytes, position: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while position < end and shift < 70:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
    raise ProtocolError("the message ends inside a number, or a number is too long")


def check_parsed_size(data: bytes, descriptor: Descriptor, max_bytes: int) -> int:
    """An upper estimate of the bytes that a parsed message takes, beside the contents of its strings.

    Raises:
        ProtocolError: `data` is no protobuf message.
        LimitExceededError: the estimate exceeds `max_bytes`; the walk stops there.
    """
    cost = position = 0
    stack = [(len(data), _length_delimited_fields(descriptor))]
    while stack:
        end, fields = stack[-1]
        if position >= end:
            stack.pop()
            continue
        key, position = _varint(data, position, end)
        wire_type = key & 7
        if wire_type == 2:
            length, position = _varint(data, position, end)
            stop = position + length
            if stop > end:
                raise ProtocolError("the message is truncated: a field is longer than what holds it")
            kind = fields.get(key >> 3)
            if isinstance(kind, Descriptor):
                cost += _MESSAGE_COST
                stack.append((stop, _length_delimited_fields(kind)))
            else:
                cost += _NUMBER_COST * length if kind == "packed" else _STRING_COST
                position = stop
        elif wire_type == 0:
            _, position = _varint(data, position, end)
            cost += _NUMBER_COST
        elif wire_type in (1, 5):
            position += 8 if wire_type == 1 else 4
            cost += _NUMBER_COST
            if position > end:
                raise ProtocolError("the message is truncated: a field is longer than what holds it")
        else:
            raise ProtocolError(f"wire type {wire_type} is not used by this protocol")
        if cost > max_bytes:
            raise LimitExceededError(
                f"the message would take more than {max_bytes} bytes once parsed (limit max_parsed_bytes)",
                limit="max_parsed_bytes",
                allowed=max_bytes,
                requested=cost,
            )
    return cost


def parse(message_type: type[M], data: bytes, *, max_parsed_bytes: int = MAX_PARSED_BYTES) -> M:
    """`data` as a message of `message_type`.

    Raises:
        ProtocolError: it is none.
        LimitExceededError: it would take more than `max_parsed_bytes`.
    """
    if len(data) > UNCHECKED_BYTES:
        check_parsed_size(data, cast("Descriptor", message_type.DESCRIPTOR), max_parsed_bytes)
    message = message_type()
    try:
        message.ParseFromString(data)
    except DecodeError:
        # The parser's own text is about its internals.
        raise ProtocolError(f"{len(data)} bytes that are not a valid {message_type.DESCRIPTOR.name}") from None
    return message


def serialize(message: Message) -> bytes:
    """`message` as bytes, the same for equal messages (of one protobuf version)."""
    return message.SerializeToString(deterministic=True)
