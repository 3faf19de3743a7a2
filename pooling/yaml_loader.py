# SPDX-License-Identifier: Apache-2.0
"""YAML as PyYAML reads it, whatever other packages of the process make of PyYAML."""

from __future__ import annotations

from typing import Any, ClassVar

import yaml
from yaml.constructor import SafeConstructor


class SafeLoader(yaml.SafeLoader):
    """PyYAML's, where a date is a date.

    lm-format-enforcer, which vLLM imports with some requests, makes dates texts for the whole process.
    """

    yaml_constructors: ClassVar[dict[str | None, Any]] = {
        **yaml.SafeLoader.yaml_constructors,
        "tag:yaml.org,2002:timestamp": SafeConstructor.construct_yaml_timestamp,
    }
