"""Plain YAML, and nothing of what YAML can do beyond it."""

import re
from typing import Any

import yaml

from uptrain.errors import RecipeError

_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_MOST_DEPTH = 20
_MOST_DIGITS = 40  # long ones take quadratic time to read, and cannot be shown


class _StrictLoader(yaml.SafeLoader):
    """No tags, no aliases (they can be bombs), no key twice, no text that no path can hold."""

    depth = 0

    # PyYAML's stubs give its parser no types.
    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        line = f"line {event.start_mark.line + 1}"
        if isinstance(event, yaml.AliasEvent):
            raise yaml.YAMLError(f"{line}: aliases are refused")
        if getattr(event, "tag", None) is not None:
            raise yaml.YAMLError(f"{line}: tags are refused")
        self.depth += 1
        if self.depth > _MOST_DEPTH:
            raise yaml.YAMLError(f"{line}: nested too deeply")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def compose_scalar_node(self, anchor: Any) -> Any:
        node = super().compose_scalar_node(anchor)
        line = f"line {node.start_mark.line + 1}"
        if node.tag in _NUMBERS and len(node.value) > _MOST_DIGITS:
            raise yaml.YAMLError(f"{line}: a number of {len(node.value)} characters")
        if re.search("[\0\ud800-\udfff]", node.value):
            raise yaml.YAMLError(f"{line}: a NUL or half a surrogate pair")
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set()
        line = node.start_mark.line + 1
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.YAMLError(f"the block at line {line} has a key that is no word")
            if key.value in seen:
                raise yaml.YAMLError(f"the block at line {line} has the key {key.value} twice")
            seen.add(key.value)
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
        RecipeError: If it is malformed, has tags, aliases, a key twice, or a value that nothing can
            be called.
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
