"""Who is asking: the key of a request to the account that it belongs to.

A key is never logged, never part of an error, and compared in constant time.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from typing import Protocol

from patchbay.errors import UnauthenticatedError

_HOW = "pass api_key=... to patchbay.connect, or set PATCHBAY_API_KEY; `patchbay keys create` on the server makes one"
_MAX_KEY_CHARS = 512


class Authenticator(Protocol):
    """Decides whose a request is."""

    def account_for(self, api_key: str | None) -> str:
        """The account that `api_key` belongs to.

        Raises:
            UnauthenticatedError: no key, or one that is not known (any more).
        """


class KeyVerifier(Protocol):
    """What `KeyAuthenticator` needs of a store of keys."""

    def verify(self, key: str) -> str | None:
        """The account that `key` belongs to, or None."""


class AllowAll:
    """Everybody is one account: for in-process use, and for servers started with ``--insecure``."""

    def __init__(self, account: str = "local") -> None:
        self._account = account

    def account_for(self, api_key: str | None) -> str:
        del api_key
        return self._account


class KeyAuthenticator:
    """A key is required, and looked up in a store."""

    def __init__(self, key_store: KeyVerifier) -> None:
        self._key_store = key_store

    def account_for(self, api_key: str | None) -> str:
        if not api_key:
            raise UnauthenticatedError(f"this server needs an API key: {_HOW}", reason="NO_API_KEY")
        account = self._key_store.verify(api_key) if len(api_key) <= _MAX_KEY_CHARS else None
        if account is None:
            raise UnauthenticatedError(
                f"this server does not know the API key that was sent (it may have been revoked): {_HOW}",
                reason="UNKNOWN_API_KEY",
            )
        return account


class DigestKeys:
    """A fixed set of keys, held as digests: for tests and for servers whose keys come from outside."""

    def __init__(self, keys: Mapping[str, str]) -> None:
        """
        Args:
            keys: key -> account.
        """
        self._accounts = tuple((_digest(key), account) for key, account in keys.items())

    def verify(self, key: str) -> str | None:
        digest, found = _digest(key), None
        # Every digest is compared, so that the time says nothing about which one matched.
        for known, account in self._accounts:
            if hmac.compare_digest(digest, known):
                found = account
        return found


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
