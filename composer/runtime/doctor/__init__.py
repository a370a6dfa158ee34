"""`compose-doctor`: what keeps this host from serving.

`facts`, with `driver` and `probe`, reads; `gpus`, `machine` and `place` judge what was read; `tree` compares the
bundle's files with its manifest; `trials` tries imports (`importing`) and kernels (`self_test`) in child processes;
`report` shows it all.
"""
