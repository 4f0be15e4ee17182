"""Which of the vision tower's hidden states are features: arithmetic on a `LlavaConfig`, without torch."""

from typing import Any


def num_layers_used(config: Any) -> int:
    """Return how many of the tower's layers the features need, by a `LlavaConfig`.

    Hidden state 0 is the input of the first layer, so hidden state k needs k layers.
    """
    return max(feature_states(config))


def feature_states(config: Any) -> list[int]:
    """Return the hidden states that are features; negative ones count from the last of `num_hidden_layers + 1`."""
    layers, states = config.vision_feature_layer, config.vision_config.num_hidden_layers + 1
    return [layer % states for layer in ([layers] if isinstance(layers, int) else layers)]


def feature_width(config: Any) -> int:
    """Return the width of the features that the projector reads: of all hidden states that are features."""
    return int(config.vision_config.hidden_size) * len(feature_states(config))
