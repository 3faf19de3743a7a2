# SPDX-License-Identifier: Apache-2.0
"""A demo that runs anywhere, on tiny random-weight models."""
