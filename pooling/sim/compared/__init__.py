# SPDX-License-Identifier: Apache-2.0
"""What ours is compared with in simulated time: other systems, and a bound for all."""
