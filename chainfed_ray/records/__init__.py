"""Records of a job: its rounds and results, the partition of its rows, and the commit log that makes them durable.

Also what a service tells of a job: its states, and a line of its log.
"""
