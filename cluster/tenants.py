"""What a tenant sees of a service's jobs, models and aliases, and what it calls them."""

from dataclasses import dataclass
from hashlib import blake2b

DEFAULT_TENANT = "default"
"""Whose everything is in a service without keys."""


@dataclass(frozen=True)
class View:
    """What ``tenant`` sees: its own, or ``everything``. Its own have short names, those of others ``<tenant>/<name>``."""

    tenant: str = DEFAULT_TENANT
    everything: bool = True

    def name(self, tenant: str, own: str) -> str:
        """What ``tenant`` calls ``own``, as it is called here."""
        return own if tenant == self.tenant else f"{tenant}/{own}"

    def parts(self, name: str) -> tuple[str | None, str]:
        """The tenant that a name means, and what it calls it. None if there can be none, or it is not seen."""
        tenant, _, own = name.rpartition("/")
        tenant = tenant or self.tenant
        is_seen = "\0" not in name and (self.everything or tenant == self.tenant)
        return (tenant, own) if is_seen else (None, "")

    def alias_key(self, name: str) -> str:
        """The name of an alias in the database; one that no alias has, if it is not seen."""
        tenant, own = self.parts(name)
        return own if tenant in (None, DEFAULT_TENANT) else f"{tenant}/{own}"

    def alias_name(self, key: str) -> str:
        """What the alias with a name in the database is called here."""
        tenant, _, own = key.rpartition("/")
        return self.name(tenant or DEFAULT_TENANT, own)


def lock_number(tenant: str) -> int:
    """The second of the two numbers by which PostgreSQL knows an advisory lock of ``tenant``; the first says of what."""
    return int.from_bytes(blake2b(tenant.encode(), digest_size=4).digest(), "big", signed=True)
