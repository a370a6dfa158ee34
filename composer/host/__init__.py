"""What a host is, and which bundle fits it."""
