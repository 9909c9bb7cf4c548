"""Results: the schema of their rows, which all that measures and all that shows share."""
