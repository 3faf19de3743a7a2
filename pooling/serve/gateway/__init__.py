# SPDX-License-Identifier: Apache-2.0
"""From a request's path and body to the app of its model."""
