#!/bin/sh
# Run a model as a service of a bundle without systemd, as its operator would: install, start, ask, restart, stop.
#
#     sh tests/gpu/service.sh BUNDLE MODEL
set -eu
bundle=$1 model=$(CDPATH= cd -- "$2" && pwd)

service() { "$bundle/bin/compose-service" --plain --name proof "$@"; }
ask() {
    "$bundle/bin/python" -c '
import json, urllib.request
body = json.dumps({"model": "default", "prompt": "It was", "max_tokens": 8, "temperature": 0}).encode()
request = urllib.request.Request("http://127.0.0.1:30123/v1/completions", body, {"Content-Type": "application/json"})
print("answer:", json.load(urllib.request.urlopen(request, timeout=60))["choices"][0]["text"].encode())
'
}
stopped() {
    code=0
    service status || code=$?
    [ $code = 3 ]
}

service install --set SGLANG_MODEL="$model" --set SGLANG_HOST=127.0.0.1 --set SGLANG_PORT=30123
trap 'service stop || true; service uninstall || true' EXIT
stopped
service start
service wait
service status
ask
service restart
service wait
ask
service logs | tail -n 3
service stop
stopped
echo ok
