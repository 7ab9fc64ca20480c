"""The configuration of a run, what is built of it, its steps and its checkpoints."""
