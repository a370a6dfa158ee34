# What the proofs on a GPU host share. Sourced, as root, with $here (this folder) and $results set.
#
# `unpack BUNDLE PREFIX` says how long it took; the new prefix is root's, and read-only.
# /usr/local/cuda* is out of sight until the end: a bare host has no toolkit. $work is a folder with a copy of the tests,
# and `stranger COMMAND...` runs a command there as a user without a passwd entry, with an empty PATH and a fresh home.
# `step NAME COMMAND...` keeps what the stranger is told in $results/NAME.txt. Every step runs, whatever becomes of the
# one before; `finish` counts the failures.
work=$(mktemp -d)
mkdir -p "$results" "$work/home" "$work/tests"
cp "$here"/*.py "$here"/*.sh "$work/tests"
chown -R 12345:12345 "$work"
chmod 755 "$work"

hide() { for each in /usr/local/cuda*; do [ -e "$each" ] && mv "$each" "$each.hidden"; done; true; }
restore() { for each in /usr/local/cuda*.hidden; do [ -e "$each" ] && mv "$each" "${each%.hidden}"; done; true; }
trap restore EXIT
hide

now() { date +%s%N; }
unpack() {
    began=$(now)
    mkdir -p "$2"
    tar --zstd -xf "$1" -C "$2"
    echo "untar: $((($(now) - began) / 1000000)) ms"
    chmod -R a-w "$2"
}
stranger() {
    (cd "$work" && exec setpriv --reuid 12345 --regid 12345 --clear-groups --no-new-privs \
        env -i HOME="$work/home" PATH=/nonexistent "$@")
}
failed=0
step() {
    name=$1 && shift
    echo "== $name"
    stranger "$@" > "$results/$name.txt" 2>&1 || failed=$((failed + 1))
    tail -n 30 "$results/$name.txt"
}
finish() {
    cp "$work"/*.log "$results" 2>/dev/null || true
    echo "$failed steps failed"
    exit "$failed"
}
