"""Each module alone, in memory or on tiny files."""
