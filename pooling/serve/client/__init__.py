# SPDX-License-Identifier: Apache-2.0
"""The frontend's side of the engines: clients, journal, the host process."""
