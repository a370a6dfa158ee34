"""`sglang-serve` and `sglang-resolve-model`: from settings to a server's command.

`options` reads variables and flags, `profiles` the bundle's launch profiles; `resolve` finds the model and notes it in
an `env_file`; `launch` puts all of it together, and `preflight` asks for port and GPUs; `cli` starts the server.
"""
