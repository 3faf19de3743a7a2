# SPDX-License-Identifier: Apache-2.0
"""Entry of the host process: `python -m tokenpool.host CONTROL_SOCKET HOST_CONFIG_JSON`, and of a template of hosts.

The imports take seconds, so it is settled before them that the process ends with its parent.
"""

from __future__ import annotations

import importlib

from tokenpool.process.template_process import words_of_child

if __name__ == "__main__":
    words = words_of_child(lambda: importlib.import_module("tokenpool.host.entry").prepare())
    from tokenpool.host.entry import main

    main(*words)
