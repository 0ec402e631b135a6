"""Runs the clients' turns as calls of Ray actors."""
