"""What only a GPU can show; `acceptance` runs all of it."""
