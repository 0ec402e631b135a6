"""A machine that keeps its rows: what it is asked by the service, how it answers, and what it never tells."""
