"""Recording of demonstrations: initial states, chains of tasks, and the files they are written to."""
