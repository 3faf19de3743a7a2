# SPDX-License-Identifier: Apache-2.0
"""What a host gives away while it runs: device and host memory, and the turns of models that sleep."""
