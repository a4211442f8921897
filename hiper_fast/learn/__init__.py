"""Learning from episodes: shaping, scoring, credit for tokens, the update; the warm start; optimisers."""
