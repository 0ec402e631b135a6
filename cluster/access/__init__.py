"""Who may ask the service for what: keys, and the audit of what was asked."""
