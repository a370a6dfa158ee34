# Source this file from tcsh or csh:  source BUNDLE/bin/activate.csh     Undo it with:  deactivate
# csh does not tell where a sourced file lies. Linux does, it is open; without /proc, or in a ( ) of csh: set
# COMPOSE_PREFIX to the bundle's folder first.

set _compose_files=()
if (-d /proc/$$/fd) set _compose_files=("`readlink /proc/$$/fd/* | grep /bin/activate.csh`")
if ($?COMPOSE_PREFIX) then
    set _compose_prefix="$COMPOSE_PREFIX:q"
else
    set _compose_prefix=""
endif
if ($#_compose_files != 0) then
    set _compose_prefix="$_compose_files[$#_compose_files]:q"
    set _compose_prefix="$_compose_prefix:h"
    set _compose_prefix="$_compose_prefix:h"
endif

if (! -x "$_compose_prefix/bin/python3") then
    sh -c 'echo "activate: cannot tell where the bundle is: set COMPOSE_PREFIX to its folder and source this again" >&2'
else
    # Another bundle's, this one's from before, or that of a virtual environment.
    if ("`alias deactivate`" != "") then
        deactivate
    endif
    # csh puts a variable into `...` before it reads that, quotes and all; sh must see the dollar sign.
    setenv _COMPOSE_AT "$_compose_prefix:q"
    setenv _COMPOSE_ENTER '@ENTER@'
    set _compose_dollar='$'
    set _compose_text="`sh -fc 'IFS=; exec ${_compose_dollar}_COMPOSE_AT/bin/python3 -I -S -B -c ${_compose_dollar}_COMPOSE_ENTER ${_compose_dollar}_COMPOSE_AT/@SITE@ csh'`"
    unsetenv _COMPOSE_AT
    unsetenv _COMPOSE_ENTER
    unset _compose_dollar
    if ("$_compose_text:q" == "") then
        sh -c 'echo "activate: $1/bin/python3 does not run on this host" >&2' sh $_compose_prefix:q
    else
        eval "$_compose_text:q"
        alias deactivate '_compose_restore; test $?_COMPOSE_OLD_PROMPT != 0 && set prompt="$_COMPOSE_OLD_PROMPT:q" && unset _COMPOSE_OLD_PROMPT; unalias _compose_restore deactivate; rehash'
        if ($?prompt) then
            set _COMPOSE_OLD_PROMPT="$prompt:q"
            set prompt="(@NAME@) $prompt:q"
        endif
    endif
endif
unset _compose_files _compose_prefix _compose_text
rehash
