"""The model: configuration, routing, experts, cache, the transformer itself, its accounting, and conversion."""
