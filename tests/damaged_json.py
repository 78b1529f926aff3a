"""JSON that is damaged in one place, for the readers of what freezekit saves."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def with_another_value(text: str, data: st.DataObject) -> str:
    """Put any value in the place of one, somewhere in it."""
    content: Any = json.loads(text)
    place = content
    for _ in range(data.draw(st.integers(0, 5))):
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        if not isinstance(place[key], dict | list) or not place[key]:
            break
        place = place[key]
    keys = sorted(place) if isinstance(place, dict) else list(range(len(place)))
    place[data.draw(st.sampled_from(keys))] = data.draw(JSON)
    return json.dumps(content)


def with_other_text(text: str, data: st.DataObject) -> str:
    """Put any characters in the place of some."""
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, min(len(text), start + 30)))
    return text[:start] + data.draw(st.text(max_size=8)) + text[end:]
