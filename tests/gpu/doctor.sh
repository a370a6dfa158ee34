#!/bin/sh
# Let the doctor of an unpacked bundle look at a GPU host on which nothing is wrong, and at one whose GPUs are hidden.
#
#     sh tests/gpu/doctor.sh BUNDLE [PYTHON]
#
# Exit status 1 if a check of --gpu did not pass, took more than a minute in all, or a finding is not the expected one.
set -u
bundle=$1
python=${2:-$bundle/bin/python3}

"$bundle/bin/compose-doctor" --gpu --json | "$python" -c '
import json, sys
report = json.load(sys.stdin)
for one in report["tests"]:
    print(json.dumps(one))
for one in report["findings"]:
    print(one["severity"], one["id"], one["subject"], one["evidence"], sep=": ")
passed = {one["check"] for one in report["tests"] if one["ok"]}
failed = [one for one in report["tests"] if one["ok"] is False]
faults = [one for one in report["findings"] if one["severity"] == "error"]
seconds = sum(one["seconds"] for one in report["tests"])
print(len(report["tests"]), "checks in", round(seconds, 1), "s")
sys.exit(bool(failed or faults or seconds > 60 or not passed >= {"torch", "matmul", "rmsnorm", "attention", "triton"}))
' || exit 1

CUDA_VISIBLE_DEVICES='' "$bundle/bin/compose-doctor" --gpu | grep -q '^error: gpu.hidden: ' || exit 1
echo ok
