"""How users reach the service: the REST API on Ray Serve, and the ``chainfed`` command."""
