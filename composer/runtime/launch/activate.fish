# Source this file from fish:  source BUNDLE/bin/activate.fish     Undo it with:  deactivate

if functions -q deactivate
    deactivate
end

function deactivate
    set -gx PATH $_compose_old_path
    if functions -q _compose_old_prompt
        functions -e fish_prompt
        functions -c _compose_old_prompt fish_prompt
        functions -e _compose_old_prompt
    end
@RESTORE@
    set -e COMPOSE_PREFIX
    set -e _compose_old_path
    functions -e deactivate
end

set -gx COMPOSE_PREFIX (builtin realpath (dirname (builtin realpath (status filename)))/..)
set -g _compose_old_path $PATH
set -gx PATH $COMPOSE_PREFIX/bin $PATH
if functions -q fish_prompt
    functions -c fish_prompt _compose_old_prompt
    function fish_prompt
        printf '(%s) ' '@NAME@'
        _compose_old_prompt
    end
end
@SET@
