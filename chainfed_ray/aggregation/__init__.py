"""From the updates of a round to a stack."""
