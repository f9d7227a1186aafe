"""One file per command: each makes a plan and hands it to the engine."""
