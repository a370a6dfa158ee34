"""What this host is: its GPUs and driver, CPU, memory and limits, and who holds a port. `compose-detect` shows it."""
