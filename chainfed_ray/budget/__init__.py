"""Bytes, by arithmetic: what a turn needs, and who can take part. Integers only, and no tensor."""
