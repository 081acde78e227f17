"""Fast paths, each held to a slow twin: what attention means is said elsewhere, here how it is computed."""
