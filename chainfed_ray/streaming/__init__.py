"""Streaming: checkpoints, matrices, embedding tables and saved activations, read in pieces so that none is in memory whole."""
