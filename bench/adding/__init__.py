# SPDX-License-Identifier: Apache-2.0
"""What models cost that are added to a pool."""
