# Source this file from tcsh or csh:  source BUNDLE/bin/activate.csh     Undo it with:  deactivate
# csh tells a file where it lies at the prompt only: in a script, set COMPOSE_PREFIX to the bundle's folder first.

set _compose_words=($_)
if ($#_compose_words >= 2) then
    set _compose_file=$_compose_words[2]:q
    set _compose_folder="$_compose_file:h"
    if ("$_compose_folder" == "$_compose_file") set _compose_folder="."
    set _compose_prefix="`cd -- $_compose_folder:q/.. >& /dev/null && pwd`"
else if ($?COMPOSE_PREFIX) then
    set _compose_prefix="$COMPOSE_PREFIX"
else
    set _compose_prefix=""
endif

if (! -x "$_compose_prefix/bin/python3") then
    sh -c 'echo "activate: cannot tell where the bundle is: set COMPOSE_PREFIX to its folder and source this again" >&2'
else
    if ($?_COMPOSE_OLD_PATH) deactivate
    set _COMPOSE_OLD_PATH="$PATH"
    setenv COMPOSE_PREFIX "$_compose_prefix"
    setenv PATH "${COMPOSE_PREFIX}/bin:${PATH}"
    if ($?prompt) then
        set _COMPOSE_OLD_PROMPT="$prompt"
        set prompt="(@NAME@) $prompt:q"
    endif
@SET@
    alias deactivate 'setenv PATH "$_COMPOSE_OLD_PATH:q"; unset _COMPOSE_OLD_PATH; test $?_COMPOSE_OLD_PROMPT != 0 && set prompt="$_COMPOSE_OLD_PROMPT:q" && unset _COMPOSE_OLD_PROMPT; @RESTORE@ unsetenv COMPOSE_PREFIX; unalias deactivate; rehash'
endif
unset _compose_words _compose_file _compose_folder _compose_prefix
rehash
