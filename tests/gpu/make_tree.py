"""Make the tree of one bundle from the unpacked tree of another, where the two differ by slimming.

    ORIGINAL/bin/python tests/gpu/make_tree.py ORIGINAL COPY MANIFEST.json [FILES]

Equal files are hard links, slimmed ones are slimmed here, and others are taken from the folder FILES, where they are
named by their sha256. Every file must come out with the digest in MANIFEST (what `compose inspect --json` prints), so
COPY is the tree that the other bundle unpacks to: gigabytes need not be carried to a host twice.
"""

import hashlib
import json
import mmap
import os
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from composer.formats.slim import slim
from composer.model.gpu import Selection
from composer.proofs.slimmed import prove_slimmed


def entries_of(manifest):
    return {entry["path"]: entry for layer in manifest["layers"] for entry in layer["entries"]}


def slimmed_of(manifest):
    """Paths of slimmed files to whether their debug symbols were cut."""
    return {
        change["path"]: not change["reason"].startswith("modified against its licence")
        for layer in manifest["layers"] for change in layer.get("changes", {}).get("files", ())
        if change["kind"] == "slim" and not change["detail"].startswith("left alone")
    }  # fmt: skip


def mapped(path):
    with path.open("rb") as handle:
        return mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)


def make_smaller(source, target, wanted, sms, debug):
    """Slim, prove, and compare with the digest that the bundle's own build gave."""
    start = time.perf_counter()
    before = mapped(source)
    done = slim(before, str(source), Selection(sms=sms), debug=debug)
    with target.open("wb") as out:
        for piece in done.pieces():
            out.write(piece)
    slimmed = time.perf_counter() - start
    prove_slimmed(before, mapped(target), str(source), sms, keep_ptx=False, debug=debug)
    with target.open("rb") as handle:
        found = hashlib.file_digest(handle, "sha256").hexdigest()
    assert found == wanted, f"{source}: {found} instead of {wanted}"
    target.chmod(source.stat().st_mode)
    proven = time.perf_counter() - start - slimmed
    return f"{target.name}: {len(before) / 1e6:.1f} -> {done.size / 1e6:.1f} MB, {slimmed:.2f} s, proof {proven:.2f} s"


def place(entry, known, original, copy, files):
    source, target = original / entry["path"], copy / entry["path"]
    target.parent.mkdir(parents=True, exist_ok=True)
    if entry.get("target"):
        target.symlink_to(entry["target"])
    elif known and known.get("sha256") == entry["sha256"]:
        os.link(source, target)
    else:
        shutil.copyfile(files / entry["sha256"], target)
        target.chmod(entry.get("mode", 0o644))


def main(original, copy, manifest_path, files="/nonexistent"):
    original, copy = Path(original), Path(copy)
    manifest = json.loads(Path(manifest_path).read_text())
    known = entries_of(json.loads((original / "share/compose/manifest.json").read_text()))
    smaller = slimmed_of(manifest)
    sms = (int(manifest["target"]["sm"]),)
    with ProcessPoolExecutor() as pool:
        jobs = []
        for path, entry in entries_of(manifest).items():
            same = known.get(path, {}).get("sha256") == entry.get("sha256")
            if path in smaller and not same:
                (copy / path).parent.mkdir(parents=True, exist_ok=True)
                jobs.append(
                    pool.submit(make_smaller, original / path, copy / path, entry["sha256"], sms, smaller[path])
                )
            else:
                place(entry, known.get(path), original, copy, Path(files))
        for job in jobs:
            print(job.result(), flush=True)
    (copy / "share/compose/manifest.json").write_bytes(Path(manifest_path).read_bytes())
    (copy / "share/compose/fingerprint").write_text(manifest["fingerprint"])
    print(f"{copy}: {len(entries_of(manifest))} files, {len(jobs)} slimmed here")


if __name__ == "__main__":
    main(*sys.argv[1:])
