# SPDX-License-Identifier: Apache-2.0
"""Run by `helm test`: one chat completion from each model. Arguments: the server's URL and the models."""

import json
import os
import sys
import time
import urllib.error
import urllib.request

url, *models = sys.argv[1:]
headers = {"content-type": "application/json"}
if key := os.environ.get("TOKENPOOL_API_KEY"):
    headers["authorization"] = f"Bearer {key}"
for model in models:
    body = {"model": model, "messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 8}
    request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), headers)
    started = time.monotonic()
    try:
        with urllib.request.urlopen(request, timeout=300) as response:
            tokens = json.load(response)["usage"]["completion_tokens"]
    except urllib.error.HTTPError as error:
        sys.exit(f"{model}: {error.code} {error.read().decode(errors='replace')}")
    if tokens < 1:
        sys.exit(f"{model}: an answer without tokens")
    print(f"{model}: {tokens} tokens in {time.monotonic() - started:.1f} s")
