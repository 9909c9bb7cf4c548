"""Ray's actors, their messages, leases and devices."""
