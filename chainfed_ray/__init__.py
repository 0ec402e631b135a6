"""The method: what is computed, in torch, with no cluster in sight."""
