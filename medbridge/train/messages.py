"""Values that processes tell each other, as JSON: plain ones, and the data classes that a training step is made of.

Nothing else can be said, and what is read runs no code (a pickle would).
"""

from __future__ import annotations

import base64
import json
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np

from medbridge.data.answers import Outcome
from medbridge.data.items import Item
from medbridge.rollout.engine import Graded, Request, Rollout
from medbridge.train.groups import Batch, Group
from medbridge.train.sft import Example

_CLASSES = {kind.__name__: kind for kind in (Batch, Example, Graded, Group, Item, Outcome, Request, Rollout)}


def encode(value: Any) -> bytes:
    """A value as bytes; `decode` gives it back, floats and arrays bit for bit.

    Raises:
        TypeError: it holds something that is no number, text, None, list, tuple, mapping with text keys, numpy array,
            or one of the data classes.
    """
    return json.dumps(_plain(value)).encode()


def decode(content: bytes) -> Any:
    """The value that `encode` was given."""
    return _value(json.loads(content))


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    if isinstance(value, tuple):
        return {"tuple": [_plain(entry) for entry in value]}
    if isinstance(value, np.ndarray):
        array = np.ascontiguousarray(value)
        return {"array": base64.b64encode(array.tobytes()).decode(), "type": array.dtype.str, "shape": array.shape}
    if is_dataclass(value) and type(value).__name__ in _CLASSES:
        return {"class": type(value).__name__, "of": [_plain(getattr(value, f.name)) for f in fields(value)]}
    if hasattr(value, "items"):
        if not all(isinstance(key, str) for key in value):
            raise TypeError(f"the keys of a mapping that is sent to other processes are texts: {list(value)[:3]}")
        return {"mapping": [[key, _plain(entry)] for key, entry in value.items()]}
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"a {type(value).__name__} can't be sent to other processes")


def _value(plain: Any) -> Any:
    if isinstance(plain, list):
        return [_value(entry) for entry in plain]
    if not isinstance(plain, dict):
        return plain
    if "tuple" in plain:
        return tuple(_value(entry) for entry in plain["tuple"])
    if "array" in plain:
        content = bytearray(base64.b64decode(plain["array"]))  # writable, as the array was
        return np.frombuffer(content, dtype=plain["type"]).reshape(plain["shape"])
    if "class" in plain:
        return _CLASSES[plain["class"]](*map(_value, plain["of"]))
    return {key: _value(entry) for key, entry in plain["mapping"]}
