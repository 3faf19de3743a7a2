# SPDX-License-Identifier: Apache-2.0
"""The fault simulator: the real engine host under a seeded clock, with a stub in place of each model."""
