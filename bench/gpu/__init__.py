# SPDX-License-Identifier: Apache-2.0
"""First measurements on a GPU; none has been made. `run_all.sh` runs them in order."""
