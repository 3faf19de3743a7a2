# SPDX-License-Identifier: Apache-2.0
"""Stand-ins for devices, and the laws that each device and what lies on it keep."""
