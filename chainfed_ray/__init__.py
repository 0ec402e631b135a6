"""The ChainFed method: what is computed, in torch. Nothing here knows where it runs."""
