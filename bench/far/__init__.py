# SPDX-License-Identifier: Apache-2.0
"""What benches run on machines of their own."""
