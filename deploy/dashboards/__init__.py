# SPDX-License-Identifier: Apache-2.0
"""Grafana dashboards and Prometheus alerts, made from the metric registry: `python -m deploy.dashboards`."""
