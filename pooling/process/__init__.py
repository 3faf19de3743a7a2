# SPDX-License-Identifier: Apache-2.0
"""What a process does to itself and to its children."""
