"""The REST API: all routes but those in ``api/jobs``, what every route uses, and errors."""
