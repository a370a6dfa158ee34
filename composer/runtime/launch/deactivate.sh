#!/bin/sh
# What activate has set is undone by the shell that sourced it, with its own command:  deactivate
# This file does the same when it is sourced, and says so when it is run.
if [ "$(command -v deactivate || :)" = deactivate ]; then
    deactivate
else
    echo "deactivate: no bundle is active in this shell: it is a command of the shell that sourced activate" >&2
    return 1 2>/dev/null || exit 1
fi
