"""The algorithm: a fleet of clients trains a chain of adapters, window by window."""
