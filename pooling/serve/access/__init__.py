# SPDX-License-Identifier: Apache-2.0
"""Who may come in: keys, tenants, limits, queues."""
