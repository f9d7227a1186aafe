"""Running a transformers model one decoder layer at a time."""
