"""Deploy bundles: what other systems need to run one."""
