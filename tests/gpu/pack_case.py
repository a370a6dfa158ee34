"""Put beside an unmodified bundle what `make_tree.py` needs to turn its tree into that of other bundles.

    .venv/bin/python tests/gpu/pack_case.py FOLDER UNMODIFIED.tar.zst NAME=OTHER.tar.zst ...

FOLDER/NAME.json is the manifest of the other bundle, FOLDER/files what is in it and neither in the unmodified one nor
made from it by slimming: a few megabytes of text and stubs.
"""

import json
import sys
from pathlib import Path

from make_tree import entries_of, slimmed_of

from composer.steps.bundle import open_bundle


def main(folder, unmodified, *others):
    files = Path(folder, "files")
    files.mkdir(parents=True, exist_ok=True)
    known = {
        entry.get("sha256") for entry in entries_of(json.loads(open_bundle(Path(unmodified)).manifest_json)).values()
    }
    for other in others:
        name, _, path = other.partition("=")
        bundle = open_bundle(Path(path))
        manifest = json.loads(bundle.manifest_json)
        Path(folder, f"{name}.json").write_bytes(bundle.manifest_json)
        wanted = {entry["sha256"] for path, entry in entries_of(manifest).items()
                  if path not in slimmed_of(manifest) and not entry.get("target")} - known  # fmt: skip
        for index, layer in enumerate(bundle.manifest.layers):
            if any(entry.sha256 in wanted for entry in layer.entries):
                for entry, content in bundle.entries(index):
                    if content is not None and entry.sha256 in wanted:
                        (files / entry.sha256).write_bytes(content.read())
        print(f"{name}: {len(wanted)} files")


if __name__ == "__main__":
    main(*sys.argv[1:])
