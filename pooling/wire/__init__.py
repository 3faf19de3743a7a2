# SPDX-License-Identifier: Apache-2.0
"""What hosts, controllers and frontends say to each other."""
