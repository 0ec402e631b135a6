"""Who sends a request, and what that allows."""

from dataclasses import dataclass
from typing import Literal, get_args

from chainfed_ray.cluster.tenants import DEFAULT_TENANT

Scope = Literal["submit", "read", "infer", "admin", "site"]
"""What a key allows: change jobs and aliases, look at them, ask models, everything, or be a site."""
SCOPES: tuple[Scope, ...] = get_args(Scope)


@dataclass(frozen=True)
class Identity:
    """Who sends a request: the key ``key``, which ``owner`` has and calls ``name``, and which allows ``scopes``.

    With ``requests_per_minute`` the key may send so many, whatever its tenant may.
    """

    key: str
    owner: str
    name: str
    scopes: frozenset[Scope]
    requests_per_minute: int | None = None

    @property
    def tenant(self) -> str:
        """Whose jobs and models these are: each owner is a tenant."""
        return self.owner

    @property
    def sees_everything(self) -> bool:
        """Whether they see what other tenants have."""
        return "admin" in self.scopes

    @property
    def site(self) -> str | None:
        """The name of the site whose key this is; None for a key of another kind."""
        return self.name if "site" in self.scopes else None

    @property
    def reads_anything(self) -> bool:
        """Whether their jobs may read what the service can read: only the user of a service without keys may."""
        return not self.key

    def allows(self, scope: Scope) -> bool:
        """Whether the key allows what needs ``scope``. ``admin`` allows everything but to be a site, which has a name."""
        return scope in self.scopes or ("admin" in self.scopes and scope != "site")


WITHOUT_KEYS = Identity("", DEFAULT_TENANT, "", frozenset({"admin"}))
"""Whoever asks a service in which no key was made."""
