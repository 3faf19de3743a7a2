# SPDX-License-Identifier: Apache-2.0
"""Where the KV of a host's models lies, and how it moves."""
