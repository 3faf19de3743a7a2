# SPDX-License-Identifier: Apache-2.0
"""The port itself: parsers, sizes, times, TLS, CORS."""
