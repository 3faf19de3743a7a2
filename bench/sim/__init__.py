# SPDX-License-Identifier: Apache-2.0
"""Scripts that simulate pools of GPUs: nothing is measured."""
