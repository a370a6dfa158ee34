# Source this file from fish:  source BUNDLE/bin/activate.fish     Undo it with:  deactivate

set -l prefix (builtin realpath -- (dirname -- (builtin realpath -- (status filename)))/.. | string collect)

if functions -q deactivate
    deactivate
end

set -l text ($prefix/bin/python3 -I -S -B -c '@ENTER@' $prefix/@SITE@ fish | string collect)
if test -z "$text"
    echo "activate: $prefix/bin/python3 does not run on this host" >&2
    return 1
end
eval $text

if functions -q fish_prompt
    functions -c fish_prompt _compose_old_prompt
    function fish_prompt
        printf '(%s) ' '@NAME@'
        _compose_old_prompt
    end
end

function deactivate
    _compose_restore
    if functions -q _compose_old_prompt
        functions -e fish_prompt
        functions -c _compose_old_prompt fish_prompt
        functions -e _compose_old_prompt
    end
    functions -e _compose_restore deactivate
end
