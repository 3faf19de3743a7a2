# SPDX-License-Identifier: Apache-2.0
"""One host on several devices."""
