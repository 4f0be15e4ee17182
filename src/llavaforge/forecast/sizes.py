"""The sizes of a LLaVA, and its parameters by part: exact, from configs alone.

Comes in: numbers of two configs. Goes out: counts of parameters, of what learns, and of the weights in matrix products.
What transformers' modules hold is written down here once more; `tests/forecast/test_sizes.py` compares, family by
family.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llavaforge.config.schema import LearningOptions
from llavaforge.config.train_types import TRAIN_TYPES, PartName
from llavaforge.engine.memory import Counts
from llavaforge.errors import UserError
from llavaforge.model.feature_layers import feature_states, feature_width, num_layers_used
from llavaforge.model.flops import Matrices


@dataclass(frozen=True)
class Linear:
    """One linear layer."""

    inputs: int
    outputs: int
    has_bias: bool

    @property
    def num_weights(self) -> int:
        """Of the matrix."""
        return self.inputs * self.outputs

    @property
    def num_parameters(self) -> int:
        """Bias included."""
        return self.num_weights + self.outputs * self.has_bias


@dataclass(frozen=True)
class TextFamily:
    """How the layers of a family of language models are made.

    Attributes:
        defaults: what transformers takes where a config.json says nothing; None: follows from the other sizes.
        bias_of_qkv: of the query, key and value layers; None: as `attention_bias` says, for the output layer too.
        normalises_heads: queries and keys are normalised head by head.
        is_fused: one layer makes queries, keys and values, one gate and up.
        norm_in_float32: the norm's weight is applied in float32.
    """

    defaults: Mapping[str, Any]
    bias_of_qkv: bool | None = None
    normalises_heads: bool = False
    is_fused: bool = False
    norm_in_float32: bool = False


def _sizes(vocab: int, width: int, intermediate: int, layers: int, heads: int, **others: Any) -> dict[str, Any]:
    return {
        "vocab_size": vocab, "hidden_size": width, "intermediate_size": intermediate, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": None, "head_dim": None, "tie_word_embeddings": False,
        "attention_bias": False, "mlp_bias": False, **others,
    }  # fmt: skip


TEXT_FAMILIES: dict[str, TextFamily] = {
    "qwen2": TextFamily(_sizes(151_936, 4096, 22_016, 32, 32, num_key_value_heads=32), bias_of_qkv=True),
    "qwen3": TextFamily(
        _sizes(151_936, 4096, 22_016, 32, 32, num_key_value_heads=32, head_dim=128), normalises_heads=True
    ),
    "llama": TextFamily(_sizes(32_000, 4096, 11_008, 32, 32)),
    "mistral": TextFamily(_sizes(32_000, 4096, 14_336, 32, 32, num_key_value_heads=8), bias_of_qkv=False),
    "gemma": TextFamily(
        _sizes(256_000, 3072, 24_576, 28, 16, num_key_value_heads=16, head_dim=256, tie_word_embeddings=True),
        norm_in_float32=True,
    ),
    "phi3": TextFamily(_sizes(32_064, 3072, 8192, 32, 32), bias_of_qkv=False, is_fused=True),
}
"""By the `model_type` of the language model's config."""


@dataclass(frozen=True)
class TextSizes:
    """A language model, with the names that its config has."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool

    @property
    def family(self) -> TextFamily:
        """Its row."""
        return TEXT_FAMILIES[self.model_type]

    @property
    def width_of_queries(self) -> int:
        """Of all heads together."""
        return self.num_attention_heads * self.head_dim

    @property
    def width_of_keys(self) -> int:
        """Of all heads of keys together; values are as wide."""
        return self.num_key_value_heads * self.head_dim

    @property
    def linears(self) -> dict[str, Linear]:
        """The linear layers of one layer, by name."""
        family, width, inner = self.family, self.hidden_size, self.intermediate_size
        queries, keys = self.width_of_queries, self.width_of_keys
        qkv = self.attention_bias if family.bias_of_qkv is None else family.bias_of_qkv
        output = Linear(queries, width, self.attention_bias and family.bias_of_qkv is None)
        down = Linear(inner, width, self.mlp_bias)
        if family.is_fused:
            return {
                "qkv_proj": Linear(width, queries + 2 * keys, qkv),
                "o_proj": output,
                "gate_up_proj": Linear(width, 2 * inner, self.mlp_bias),
                "down_proj": down,
            }
        return {
            "q_proj": Linear(width, queries, qkv),
            "k_proj": Linear(width, keys, qkv),
            "v_proj": Linear(width, keys, qkv),
            "o_proj": output,
            "gate_proj": Linear(width, inner, self.mlp_bias),
            "up_proj": Linear(width, inner, self.mlp_bias),
            "down_proj": down,
        }

    @property
    def num_parameters(self) -> int:
        """All of them; a tied head has none of its own."""
        norms = 2 * self.hidden_size + 2 * self.head_dim * self.family.normalises_heads
        layer = norms + sum(linear.num_parameters for linear in self.linears.values())
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return embeddings + self.num_hidden_layers * layer + self.hidden_size


VISION_DEFAULTS: dict[str, dict[str, Any]] = {
    "clip_vision_model": {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
        "num_channels": 3, "image_size": 224, "patch_size": 32, "hidden_act": "quick_gelu", "vision_use_head": False,
    },
    "siglip_vision_model": {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
        "num_channels": 3, "image_size": 224, "patch_size": 16, "hidden_act": "gelu_pytorch_tanh",
        "vision_use_head": True,
    },
}  # fmt: skip
"""What transformers takes where a tower's config.json says nothing."""


@dataclass(frozen=True)
class VisionSizes:
    """A vision tower, with the names that its config has.

    Attributes:
        has_class_token: a token stands before the patches.
        vision_use_head: a pooling head follows, which no feature depends on (SigLIP).
    """

    model_type: str
    has_class_token: bool
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_channels: int
    image_size: int
    patch_size: int
    hidden_act: str
    vision_use_head: bool

    @property
    def num_patches(self) -> int:
        """Of an image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_tokens(self) -> int:
        """Patches and class token of an image."""
        return self.num_patches + self.has_class_token

    @property
    def patch_weights(self) -> int:
        """Of the patch embedding."""
        return self.num_channels * self.patch_size**2 * self.hidden_size

    @property
    def layer_weights(self) -> int:
        """In the matrices of one layer."""
        return 4 * self.hidden_size**2 + 2 * self.hidden_size * self.intermediate_size

    @property
    def layer_parameters(self) -> int:
        """Of one layer: its matrices, a bias each, two norms."""
        return self.layer_weights + 9 * self.hidden_size + self.intermediate_size

    @property
    def parameters_before_layers(self) -> int:
        """Of what the features need beside the layers: the embeddings, and the norm after them (CLIP)."""
        once = 3 if self.has_class_token else 1  # the class token and CLIP's norm; SigLIP's bias of the patches
        return self.patch_weights + (self.num_tokens + once) * self.hidden_size

    @property
    def parameters_after_layers(self) -> int:
        """Of what no feature depends on: the last norm, and SigLIP's pooling head."""
        width, inner = self.hidden_size, self.intermediate_size
        head = width + 4 * (width**2 + width) + 2 * width + 2 * width * inner + inner + width
        return 2 * width + head * self.vision_use_head


@dataclass(frozen=True)
class ModelSizes:
    """A LLaVA, with the names that its config has."""

    vision_config: VisionSizes
    text_config: TextSizes
    vision_feature_layer: int | list[int]
    vision_feature_select_strategy: str
    multimodal_projector_bias: bool

    @property
    def num_image_tokens(self) -> int:
        """Tokens that one image takes."""
        return self.vision_config.num_tokens - (self.vision_feature_select_strategy == "default")

    @property
    def feature_states(self) -> list[int]:
        """Which hidden states of the tower are features."""
        return feature_states(self)

    @property
    def projector(self) -> tuple[Linear, Linear]:
        """Its two layers."""
        width, bias = self.text_config.hidden_size, self.multimodal_projector_bias
        return Linear(feature_width(self), width, bias), Linear(width, width, bias)

    @property
    def parameters(self) -> dict[str, int]:
        """Number of parameters of each part, and of all."""
        vision = self.vision_config
        tower = vision.parameters_before_layers + vision.parameters_after_layers
        parts = {
            "vision_tower": tower + vision.num_hidden_layers * vision.layer_parameters,
            "projector": sum(linear.num_parameters for linear in self.projector),
            "language_model": self.text_config.num_parameters,
        }
        return parts | {"total": sum(parts.values())}

    def loras(self, options: LearningOptions) -> dict[str, Linear]:
        """Return the linear layers of one layer that get a LoRA.

        Raises:
            UserError: none does.
        """
        linears = self.text_config.linears
        chosen = {name: linear for name, linear in linears.items() if name in options.lora_target_modules}
        if not chosen:
            raise UserError(
                f"lora_target_modules {list(options.lora_target_modules)} match nothing in the language model. "
                f"It has: {', '.join(sorted(linears))}."
            )
        return chosen

    def learning(self, options: LearningOptions) -> dict[PartName, int]:
        """Return the number of parameters that learn, by part."""
        vision = self.vision_config
        used = vision.parameters_before_layers + num_layers_used(self) * vision.layer_parameters
        counts = {"vision_tower": used, "projector": self.parameters["projector"]}
        counts["language_model"] = self.parameters["language_model"]
        if options.uses_lora:
            counts["lora"] = self._lora_parameters(options)
        return {part: counts[part] for part in TRAIN_TYPES[options.train_type].parts}

    def counts(self, options: LearningOptions) -> Counts:
        """Return what an engine's memory depends on."""
        learning = self.learning(options)
        text, projector = self.text_config, [linear.num_weights for linear in self.projector]
        largest = {"projector": max(projector), "vision_tower": self._largest_of_tower()}
        largest["language_model"] = max(
            text.vocab_size * text.hidden_size, *(linear.num_weights for linear in text.linears.values())
        )
        if "lora" in learning:
            sides = [side for linear in self.loras(options).values() for side in (linear.inputs, linear.outputs)]
            largest["lora"] = options.lora_r * max(sides)
        total = self.parameters["total"] + learning.get("lora", 0)
        return Counts(total, sum(learning.values()), max(largest[part] for part in learning))

    def matrices(self, options: LearningOptions) -> Matrices:
        """Return what FLOPs are counted from."""
        text, vision, (first, second) = self.text_config, self.vision_config, self.projector
        layer = sum(linear.num_weights for linear in text.linears.values())
        return Matrices(
            patch_embedding=vision.patch_weights,
            tower_layer=vision.layer_weights,
            projector=(first.num_weights, second.num_weights),
            body=text.num_hidden_layers * layer,
            lora=self._lora_parameters(options) if options.uses_lora else 0,
            head=text.hidden_size * text.vocab_size,
            num_patches=vision.num_patches,
            tower_tokens=vision.num_tokens,
            tower_width=vision.hidden_size,
            tower_layers=num_layers_used(self),
            attention_width=text.width_of_queries,
            num_layers=text.num_hidden_layers,
        )

    def _largest_of_tower(self) -> int:
        vision = self.vision_config
        inner = max(vision.hidden_size, vision.intermediate_size)
        return vision.hidden_size * max(inner, vision.num_channels * vision.patch_size**2, vision.num_tokens)

    def _lora_parameters(self, options: LearningOptions) -> int:
        per_layer = sum(linear.inputs + linear.outputs for linear in self.loras(options).values())
        return options.lora_r * per_layer * self.text_config.num_hidden_layers
