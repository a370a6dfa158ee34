"""What is proven of a tree; each proof returns findings."""
