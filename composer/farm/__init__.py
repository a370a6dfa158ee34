"""Run many steps that depend on each other, each once: on this machine's cores, or on an existing cluster.

Nothing here knows what a step does: a step is a value, and one function performs it wherever it is sent.
"""
