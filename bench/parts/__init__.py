# SPDX-License-Identifier: Apache-2.0
"""What the scripts of this folder's parent share: servers under test, loads, inputs."""
