"""Tests, and what they are made of."""
