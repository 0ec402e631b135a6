"""The REST API: its routes, the JSON that they take and return, and its errors."""
