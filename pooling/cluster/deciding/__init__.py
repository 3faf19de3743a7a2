# SPDX-License-Identifier: Apache-2.0
"""What the controller decides on: what is so in the pool, and which models are to be loaded now. Plain Python."""
