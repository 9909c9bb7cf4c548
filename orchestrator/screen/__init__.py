"""What a sweep shows while it runs."""
