# SPDX-License-Identifier: Apache-2.0
"""Images and sounds of requests."""
