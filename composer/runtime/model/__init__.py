"""`compose-model`, and what the other programs know of models.

`place` says where to look; `hub` lists what is there; `snapshot`, with `safetensors`, says what a model's folder lacks;
`archive` is the format of model bundles.
"""
