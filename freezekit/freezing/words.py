"""Words: what the names of layers and parameters tell, as people choose them."""

from __future__ import annotations

import re

__all__ = [
    "ADAPTER",
    "ADAPTER_CLASS",
    "AUXILIARY",
    "CONSTANT",
    "INPUT",
    "NETWORK",
    "ON_NETWORK",
    "PIECE",
    "TOKEN",
    "all_of",
    "is_head",
    "is_network",
    "words",
]

# Words of names: the first or the last one makes a head, the last one a network, all of them a piece of one.
HEAD = frozenset(
    {"aux", "auxiliary", "classif", "classification", "classifier", "classifiers", "cls", "fc", "fcs",
     "final", "head", "heads", "last", "lin", "linear", "logit", "logits", "out", "output", "outputs", "pred",
     "prediction", "predictions", "predictor", "predictors", "readout", "regression", "regressor",
     "regressors"}
)  # fmt: skip
END = frozenset({"final", "last", "out", "output", "outputs"})
AUXILIARY = frozenset({"aux", "auxiliary"})
NETWORK = frozenset(
    {"backbone", "backbones", "base", "body", "encoder", "encoders", "extractor", "feature", "features",
     "trunk"}
)  # fmt: skip
ON_NETWORK = frozenset({"proj", "projection", "projections", "projector", "projectors"})
INPUT = frozenset(
    {"emb", "embed", "embedding", "embeddings", "embedder", "patch", "pos", "position", "positional", "stem",
     "tok", "token", "word"}
)  # fmt: skip
PIECE = INPUT | frozenset(
    {"act", "batch", "block", "blocks", "bn", "cell", "cnn", "conv", "convs", "down", "first", "in",
     "inception", "initial", "input", "layer", "layers", "level", "levels", "ln", "mid", "mixed", "norm",
     "prelu", "relu", "res", "stage", "stages", "up"}
)  # fmt: skip
ADAPTER = re.compile(r"(?:^|[._])(?:adapters?|lora|prompts?)(?:[._\d]|$)", re.IGNORECASE)
ADAPTER_CLASS = re.compile("adapter|lora|prompt", re.IGNORECASE)
_WORD = re.compile("[A-Z]?[a-z]+|[A-Z]+(?![a-z])")
TOKEN = re.compile(
    r"(cls|class|dist|distillation|mask|reg|register)_tokens?(_?\d+)?|(.*_)?pos(_.*|ition.*|\d*)"
)
CONSTANT = re.compile(rf"{TOKEN.pattern}|(.*_)?(mean|std)")


def words(name: str) -> list[str]:
    """Return the words of a name, without its digits.

    >>> words("AuxLogits"), words("fc_age2")
    (['aux', 'logits'], ['fc', 'age'])
    """
    return [word.lower() for word in _WORD.findall(name)]


def all_of(known: frozenset[str], name: str) -> bool:
    """Tell whether a name is made of known words only."""
    return bool(words(name)) and known.issuperset(words(name))


def is_head(name: str) -> bool:
    """Tell whether a part is named like a head."""
    named = words(name)
    if not named or named[-1] in NETWORK or (named[0] in NETWORK and named[-1] in END):
        return False  # "trunk_output" is a trunk's
    return bool(HEAD & {named[0], named[-1]})


def is_network(name: str) -> bool:
    """Tell whether a part is named like a whole network that features come from."""
    named = words(name)
    return bool(named) and named[-1] in NETWORK and named[0] not in HEAD
