"""Ray job entry points, one per job, and the `maskmill` command."""
