"""Kills of each kind of process of a service, at seeded points. `make faults` runs them."""
