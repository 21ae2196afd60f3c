"""Plain YAML, and nothing of what YAML can do beyond it."""

import re
from typing import Any

import yaml

from uptrain.errors import RecipeError


class _StrictLoader(yaml.SafeLoader):
    """No tags beyond the safe ones, no aliases (they can be bombs), no key twice."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            # PyYAML's stubs give its parser no types.
            line = self.peek_event().start_mark.line + 1  # type: ignore[no-untyped-call]
            raise yaml.YAMLError(f"line {line}: aliases are refused")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                line = node.start_mark.line + 1
                raise yaml.YAMLError(f"the block at line {line} has the key {key} twice")
        return super().construct_mapping(node, deep)


# YAML 1.2 reads 1e-3 as a number; PyYAML follows 1.1, where a mantissa needs its point.
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+"),
    list("-+0123456789"),
)


def parse_yaml(text: str, where: str) -> Any:
    """Parse one YAML document.

    Args:
        text: The document.
        where: What to name in an error: a file, an override.

    Raises:
        RecipeError: If it is malformed, has tags, aliases, or a key twice.
    """
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except (yaml.YAMLError, ValueError, RecursionError, TypeError, AttributeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark else ""
        reason = getattr(error, "problem", None) or " ".join(str(error).split())
        raise RecipeError(
            f"{where[:100]}: is no plain YAML ({line}{reason[:120]}); correct it"
        ) from error
