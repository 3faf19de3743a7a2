# SPDX-License-Identifier: Apache-2.0
"""What a host copy of weights lies in, and what is said of one that processes share."""
