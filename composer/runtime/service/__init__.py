"""`compose-service`: the server as a service.

`systemd` (with the text of a `unit`) and `plain` (with a `supervisor` of its own) keep it; `spec` says what a service
is; `files` and `environment_file` hold its settings; `health` asks it.
"""
