# SPDX-License-Identifier: Apache-2.0
"""How a model comes onto a host: built, adopted, reloaded."""
