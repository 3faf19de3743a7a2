# SPDX-License-Identifier: Apache-2.0
"""What requests of tests hold."""
