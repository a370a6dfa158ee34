"""The arrows of the flow, one module each: load, resolve, fetch, survey, layer, stage, pack, verify."""
