"""The device that computes: its memory cap, its peak memory, and its threads."""
