"""Between the IR and bytes: the only place of the client that touches generated code.

Encoding trusts its input, which our own code made; decoding trusts nothing. Whatever arrives becomes either a valid IR
object or a `ProtocolError` / `GraphError` that names the field, and no count or size that a message claims is believed
before it has been checked.
"""
