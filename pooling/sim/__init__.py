# SPDX-License-Identifier: Apache-2.0
"""Many devices in simulated time, with the policies of the real host; needs neither vLLM nor torch."""
