"""A client's turn: profiling, sums for a head, training."""
