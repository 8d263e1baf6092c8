"""YAML of recipes and overrides within bounds: unique keys, few levels, anchors that stay small."""

from typing import Any

import yaml

from fastdraft_hf._errors import redacted

# Values with the anchors written out, and levels of nesting.
_MOST_NODES, _DEEPEST = 100_000, 32


def read_yaml(text: str) -> Any:
    """Read YAML whose keys are unique and whose anchors stay small.

    Raises:
        ValueError: what is wrong and where, without credentials.
    """
    sizes: dict[int, float] = {}

    def size(node: Any, depth: int = 0) -> float:
        """Return how many nodes a node is with its anchors written out; infinite in a circle."""
        if depth > _DEEPEST:
            raise ValueError(f"nested more than {_DEEPEST} levels deep")
        if id(node) not in sizes:
            sizes[id(node)], below = float("inf"), node.value
            if isinstance(node, yaml.MappingNode):
                seen: set[str] = set()
                for key, _ in node.value:
                    if isinstance(key.value, str) and key.value in seen:
                        mark = key.start_mark
                        raise ValueError(f"line {mark.line + 1}: key {key.value!r} is repeated")
                    seen.add(str(key.value))
                below = [part for pair in node.value for part in pair]
            parts = [] if isinstance(node, yaml.ScalarNode) else below
            sizes[id(node)] = 1 + sum(size(part, depth + 1) for part in parts)
        return sizes[id(node)]

    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is not None and size(node) > _MOST_NODES:
            raise ValueError(f"more than {_MOST_NODES:,} values, its anchors written out")
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        # Not str(error): it quotes the file, where half of a token would not be recognized.
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        problem = getattr(error, "problem", None) or getattr(error, "reason", "it cannot be read")
        raise ValueError(f"{where}{redacted(str(problem))}") from None
    except RecursionError:
        raise ValueError(f"nested more than {_DEEPEST} levels deep") from None
    except (ValueError, LookupError, AttributeError, TypeError) as error:  # of a tag or a number
        raise ValueError(redacted(" ".join(str(error).split())[:200])) from None
