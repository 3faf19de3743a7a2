# SPDX-License-Identifier: Apache-2.0
"""From flags and the pool file to a plan, and what stands against it."""
