# SPDX-License-Identifier: Apache-2.0
"""What the controller decides, in memory, without Ray."""
