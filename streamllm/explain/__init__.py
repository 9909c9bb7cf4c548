"""Looks inside: losses around prunes, a token's time by part, text without end."""
