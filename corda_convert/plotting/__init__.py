"""Pictures, from plain numbers: needs matplotlib (the extra `[plot]`), and nothing of models or files."""
