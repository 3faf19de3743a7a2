# SPDX-License-Identifier: Apache-2.0
"""`tokenpool top`: a running pool in a terminal."""
