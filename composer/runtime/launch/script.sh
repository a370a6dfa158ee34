#!/bin/sh
''':'
# sh reads this part, Python reads it as a string: a shebang could name neither a path relative to this file nor one
# longer than 127 characters. realpath is only needed where this file is reached through a symbolic link.
self=$0
if [ -L "$self" ]; then
    self=$(realpath -- "$0" 2>/dev/null || readlink -f -- "$0") || exit 127
fi
case $self in
    */*) ;;
    *) self=./$self ;;
esac
# Not by a link to the bundle: who switches it would have this process import what is left from another release.
home=$(CDPATH= cd -P -- "${self%/*}" && pwd -P) || exit 127
# Modules of another Python, or of the home folder, must not shadow those of the bundle, in this process or its children.
unset PYTHONHOME PYTHONPATH
export PYTHONNOUSERSITE=1@EXPORTS@
exec "$home/python3"@OPTIONS@ "$0" "$@"
'''
