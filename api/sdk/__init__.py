"""The REST API as typed Python: each call described once, and sent by a client that waits or by one that does not block."""
