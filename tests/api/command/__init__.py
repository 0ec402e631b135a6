"""Tests of ``api/command``."""
