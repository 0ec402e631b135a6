"""The clients' turns as calls of Ray actors."""
