"""Runs the service on Ray Serve."""
