"""The ``chainfed`` command."""
