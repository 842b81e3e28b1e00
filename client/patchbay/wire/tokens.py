"""Tokenized texts between the IR and messages."""

from __future__ import annotations

from patchbay.errors import ProtocolError
from patchbay.ir.events import TokenizedRow
from patchbay.v1 import service_pb2


def encode_row(row: TokenizedRow) -> service_pb2.TokenizedText:
    return service_pb2.TokenizedText(
        ids=row.ids,
        # Some tokenizers show half a character as a lone surrogate, which UTF-8 cannot carry.
        strings=[s.encode("utf-8", "replace").decode("utf-8") for s in row.strings],
        starts=[start for start, _ in row.offsets],
        ends=[end for _, end in row.offsets],
        special=row.special,
        text=row.text.encode("utf-8", "replace").decode("utf-8"),
    )


def decode_row(message: service_pb2.TokenizedText, field: str) -> TokenizedRow:
    """
    Raises:
        ProtocolError: lists of different lengths.
    """
    counts = {len(part) for part in (message.ids, message.strings, message.starts, message.ends, message.special)}
    if len(counts) != 1:
        raise ProtocolError(f"{field}: lists of different lengths {sorted(counts)}", field=field)
    return TokenizedRow(
        ids=tuple(message.ids),
        strings=tuple(message.strings),
        offsets=tuple(zip(message.starts, message.ends, strict=True)),
        special=tuple(message.special),
        text=message.text,
    )
