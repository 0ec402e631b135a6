"""The algorithm: a chain of adapters, trained window by window by a fleet."""
