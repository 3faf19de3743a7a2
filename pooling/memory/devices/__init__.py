# SPDX-License-Identifier: Apache-2.0
"""The memory of a device: a seam, and what stands behind it on a CPU, a GPU and several."""
