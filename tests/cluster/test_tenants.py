"""Promises of names: what a tenant is shown can be asked for by that name, and a name means one thing."""

from hypothesis import given
from hypothesis import strategies as st

from chainfed_ray.cluster.tenants import DEFAULT_TENANT, View

tenants = st.sampled_from(["alice", "bob", "a", DEFAULT_TENANT])
names = st.from_regex(r"[a-z0-9:@.-]{1,20}", fullmatch=True)


@given(tenants, tenants, names)
def test_a_name_that_is_shown_means_what_it_was_shown_for(mine: str, whose: str, own: str) -> None:
    everything, part = View(mine, everything=True), View(mine, everything=False)
    shown = everything.name(whose, own)
    assert everything.parts(shown) == (whose, own)
    assert part.parts(shown) == ((whose, own) if whose == mine else (None, ""))
    assert everything.alias_name(everything.alias_key(shown)) == shown
    assert ("/" in shown) == (whose != mine)


@given(tenants, names)
def test_everybody_may_call_their_own_by_its_whole_name(mine: str, own: str) -> None:
    part = View(mine, everything=False)
    assert part.parts(f"{mine}/{own}") == part.parts(own) == (mine, own)
    assert part.alias_key(f"{mine}/{own}") == part.alias_key(own)


@given(st.text())
def test_any_text_is_a_name_that_is_seen_or_none(text: str) -> None:
    tenant, own = View("alice", everything=False).parts(text)
    assert (tenant, own) == (None, "") or (tenant == "alice" and text in (own, f"alice/{own}", f"/{own}"))
    assert "\0" not in own
