"""How you ask for it: REST on Ray Serve, and the ``chainfed`` command."""
