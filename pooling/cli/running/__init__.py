# SPDX-License-Identifier: Apache-2.0
"""Commands that change a running pool."""
