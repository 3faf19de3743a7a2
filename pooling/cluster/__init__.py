# SPDX-License-Identifier: Apache-2.0
"""A pool on a Ray cluster: host actors, the controller that places models, and what they say to each other."""
