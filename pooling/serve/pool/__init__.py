# SPDX-License-Identifier: Apache-2.0
"""One pool in one process: models that come and go, the host that is watched."""
