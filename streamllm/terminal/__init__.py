"""What a terminal gives and gets: arguments, messages, progress."""
