"""Playing episodes: the games of a run, prompts, one episode being played, engines, trajectories."""
