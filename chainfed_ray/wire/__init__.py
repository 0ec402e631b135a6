"""What crosses between a service and its sites: documents that both sides check, and orders and results as such documents."""
