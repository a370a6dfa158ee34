"""Real tools on small inputs."""
