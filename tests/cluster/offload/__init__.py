"""Tests of ``cluster/offload``."""
