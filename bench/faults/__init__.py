# SPDX-License-Identifier: Apache-2.0
"""Where a pool runs whose parts die, and the streams that run on it meanwhile."""
