"""The ``chainfed`` command, and the Python client of the service."""
