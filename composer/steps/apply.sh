#!/bin/sh
# Make a bundle out of an older one and a delta, where there is no `compose`: sh apply.sh OLD DELTA NEW
#
# Needs a POSIX shell with 64-bit arithmetic, dd, sed, sort, tr, and head -c, tail -c, sha256sum as in GNU coreutils and
# busybox. NEW appears whole, with NEW.sha256 beside it, or not at all: the delta's sha256 and bounds and the end of OLD
# are checked first, and NEW's sha256 last. docs/reference/delta.md describes the format.

set -euf
LC_ALL=C
export LC_ALL
part=

die() {
    printf 'error: %s\n' "$1" >&2
    exit "${2:-9}"
}

damaged() {
    die "$delta: $1. Copy the delta again."
}

path() {
    case $1 in
    -*) printf './%s\n' "$1" ;;
    *) printf '%s\n' "$1" ;;
    esac
}

bytes() {
    stat -c %s "$1" 2>/dev/null || echo $(($(wc -c <"$1")))
}

digest() {
    sum=$(sha256sum)
    printf '%s\n' "${sum%% *}"
}

# At most 15 digits, so that no sum of two overflows; no leading zero, which would make it octal.
is_number() {
    case $1 in
    '' | *[!0-9]* | 0?* | ????????????????*) return 1 ;;
    esac
}

is_digest() {
    case $1 in
    *[!0-9a-f]*) return 1 ;;
    esac
    [ ${#1} -eq 64 ]
}

is_name() {
    case $1 in
    '' | [!A-Za-z0-9]* | *[!A-Za-z0-9._+-]*) return 1 ;;
    esac
}

# $3 bytes of file $1 from offset $2 on. dd seeks in whole blocks; busybox's tail would read all that comes before.
range() {
    dd if="$1" bs=65536 skip=$(($2 / 65536)) 2>/dev/null | tail -c "+$(($2 % 65536 + 1))" 2>/dev/null | head -c "$3"
}

# Sets begin and start: where the header's second line and the stored bytes begin.
find_header() {
    first=$(head -c 64 "$delta" | tr -d '\000' | head -n 1)
    count=${first#compose-delta 1 }
    if [ "$first" = "$count" ] || ! is_number "$count" || [ "$count" -gt 16777216 ]; then
        damaged "is no delta, or one of another version"
    fi
    begin=$((${#first} + 1))
    start=$((begin + count))
    whole=$(bytes "$delta")
    [ "$whole" -ge $((start + 65)) ] || damaged "is cut short"
    [ "$(head -c $((whole - 65)) "$delta" | digest)" = "$(tail -c 65 "$delta" | tr -d '\000')" ] ||
        damaged "its bytes do not have the sha256 at its end"
}

header() {
    range "$delta" "$begin" $((start - begin))
}

# The first three lines: sets old_*, end_* and new_*.
read_head() {
    # shellcheck disable=SC2046  # words are what is wanted, and -f is set
    set -- $(header | head -n 3 | tr -d '\000')
    [ $# -eq 11 ] && [ "$1 $5 $8" = "old old-end new" ] || damaged "its header is damaged"
    old_size=$2 old_sum=$3 old_name=$4 end_size=$6 end_sum=$7 new_size=$9
    shift 9
    new_sum=$1 new_name=$2
    for one in "$old_size" "$end_size" "$new_size"; do is_number "$one" || damaged "its header is damaged"; done
    for one in "$old_sum" "$end_sum" "$new_sum"; do is_digest "$one" || damaged "its header is damaged"; done
    for one in "$old_name" "$new_name"; do is_name "$one" || damaged "its header is damaged"; done
    [ "$end_size" -le "$old_size" ] || damaged "its header is damaged"
}

parts() {
    header | tail -n +4
}

# Whether all parts lie within the delta and OLD, make NEW's size, and copy nothing twice.
check_parts() {
    parts | {
        made=0 stored=0
        while read -r kind one two; do
            case $kind in
            copy) is_number "$one" && size=$two ;;
            store) [ -z "$two" ] && size=$one ;;
            *) false ;;
            esac || exit 1
            is_number "$size" && [ "$size" -gt 0 ] || exit 1
            made=$((made + size))
            [ "$made" -le "$new_size" ] || exit 1
            [ "$kind" = copy ] || stored=$((stored + size))
        done
        [ "$made" -eq "$new_size" ] && [ $((start + stored + 65)) -eq "$whole" ]
    } || damaged "its parts are not those of the bundle that it is for"
    parts | sed -n 's/^copy //p' | sort -n | {
        end=0
        while read -r offset size; do
            [ "$offset" -ge "$end" ] || exit 1
            end=$((offset + size))
        done
        [ "$end" -le "$old_size" ]
    } || damaged "it copies what the old bundle does not have, or twice"
}

check_old() {
    [ -f "$old" ] || die "$old: is no file. The file of $old_name is needed, not the folder it was unpacked into." 2
    if [ "$(bytes "$old")" != "$old_size" ] || [ "$(tail -c "$end_size" "$old" | digest)" != "$end_sum" ]; then
        die "$old: is not the bundle that the delta starts from: $old_name, $old_size bytes, sha256 $old_sum"
    fi
}

make_new() {
    at=$start
    parts | while read -r kind one two; do
        case $kind in
        copy) range "$old" "$one" "$two" ;;
        store)
            range "$delta" "$at" "$one"
            at=$((at + one))
            ;;
        esac
    done
}

[ $# -eq 3 ] || die "usage: sh apply.sh OLD DELTA NEW" 2
[ $((4294967296 / 2)) = 2147483648 ] || die "this shell counts with less than 64 bits" 10
old=$(path "$1") delta=$(path "$2") new=$(path "$3")
[ -f "$delta" ] || die "$delta: is no file" 10
[ ! -d "$new" ] || die "$new: is a folder" 2
find_header
read_head
check_parts
check_old

trap '[ -z "$part" ] || rm -f "$part"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP
set -C
true 2>/dev/null >"$new.part.$$" || die "$new.part.$$: cannot be written" 10
set +C
part=$new.part.$$
make_new >"$part" || die "$part: cannot be written" 10
[ "$(bytes "$part")" = "$new_size" ] || die "$part: cannot be written: is the disk full?" 10
if [ "$(digest <"$part")" != "$new_sum" ]; then
    die "$old: is damaged: what came out does not have the sha256 of $new_name. Compare its own with $old_sum."
fi
sync "$part" 2>/dev/null || sync
mv -f "$part" "$new"
part=
printf '%s  %s\n' "$new_sum" "${new##*/}" >"$new.sha256"
printf '%s: %s, %s bytes, sha256 %s\n' "$new" "$new_name" "$new_size" "$new_sum"
