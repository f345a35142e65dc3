"""Keys of diffusers' configurations: those that this code follows, and all others, which must have their defaults."""

from __future__ import annotations

import inspect
import json
from collections.abc import Collection, Mapping
from typing import Any

_BOTH_UNETS = frozenset({
    "sample_size", "in_channels", "out_channels", "center_input_sample", "flip_sin_to_cos", "freq_shift", "down_block_types",
    "mid_block_type", "up_block_types", "block_out_channels", "layers_per_block", "mid_block_scale_factor",
    "downsample_padding", "dropout", "act_fn", "attention_head_dim", "norm_num_groups", "norm_eps", "resnet_time_scale_shift",
    "time_embedding_dim",
})  # fmt: skip
NETWORKS: dict[str, frozenset[str]] = {
    "UNet2DModel": _BOTH_UNETS
    | {"downsample_type", "upsample_type", "attn_norm_num_groups", "add_attention", "num_train_timesteps"},
    "UNet2DConditionModel": _BOTH_UNETS | {
        "only_cross_attention", "cross_attention_dim", "transformer_layers_per_block", "reverse_transformer_layers_per_block",
        "encoder_hid_dim", "num_attention_heads", "dual_cross_attention", "use_linear_projection", "addition_time_embed_dim",
        "upcast_attention", "resnet_skip_time_act", "resnet_out_scale_factor", "time_embedding_act_fn", "timestep_post_act",
        "conv_in_kernel", "conv_out_kernel", "projection_class_embeddings_input_dim", "mid_block_only_cross_attention",
        "cross_attention_norm", "addition_embed_type_num_heads",
    },
    "SD3Transformer2DModel": frozenset({
        "sample_size", "patch_size", "in_channels", "num_layers", "attention_head_dim", "num_attention_heads",
        "joint_attention_dim", "caption_projection_dim", "pooled_projection_dim", "out_channels", "pos_embed_max_size",
        "dual_attention_layers", "qk_norm",
    }),
    "FluxTransformer2DModel": frozenset({
        "patch_size", "in_channels", "out_channels", "num_layers", "num_single_layers", "attention_head_dim",
        "num_attention_heads", "joint_attention_dim", "pooled_projection_dim", "guidance_embeds", "axes_dims_rope",
    }),
}  # fmt: skip
"""Keys that shape a network's layers and ask for no input of their own, by its class."""

ALLOWED: dict[str, dict[str, Collection[Any]]] = {
    "UNet2DConditionModel": {"time_embedding_type": ["positional", "fourier"], "encoder_hid_dim_type": [None, "text_proj"]}
}
"""Values beside its default that a key of a network may have: what they ask for is in its own inputs."""

TABLE = frozenset({
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr",
    "prediction_type", "timestep_spacing", "steps_offset", "set_alpha_to_one", "clip_sample", "clip_sample_range",
})  # fmt: skip
"""Keys of a scheduler with a table that its process is made of."""
STEPPING = frozenset({
    "variance_type", "dynamic_thresholding_ratio", "sample_max_value", "skip_prk_steps", "interpolation_type", "solver_order",
    "algorithm_type", "solver_type", "lower_order_final", "euler_at_final", "disable_corrector", "predict_x0", "solver_p",
    "original_inference_steps", "timestep_scaling",
})  # fmt: skip
"""Keys that choose how diffusers steps along the process, which is `sampler`'s to say here, or that act only beside others."""

FLOW = frozenset({
    "num_train_timesteps", "shift", "use_dynamic_shifting", "base_shift", "max_shift", "base_image_seq_len",
    "max_image_seq_len", "time_shift_type",
})  # fmt: skip
"""Keys of a flow scheduler that its process and times are made of."""

REASONS = {
    "num_class_embeds": "it asks for class labels, and none are given; take a network without",
    "class_embed_type": "it asks for class labels, and none are given; take a network without",
    "time_cond_proj_dim": "guidance is its input, it is distilled; take the base model, and an LCM-LoRA in model.consistency",
    "time_embedding_type": "it does not take every time from 0 to the last, and a run trains at all of them; take positional",
}


def check_keys(component: str, made: Any, known: Collection[str], allowed: Mapping[str, Collection[Any]] | None = None) -> None:
    """Raises ValueError, naming model.path and the key, for one that is not known and has another value than its default.

    made: a network or scheduler of diffusers; allowed: the values that a key may have, in place of its default.
    """
    for key, parameter in inspect.signature(type(made).__init__).parameters.items():
        value = made.config.get(key, parameter.default)
        if key == "self" or key in known or value in (allowed or {}).get(key, [parameter.default]):
            continue
        default = json.dumps(parameter.default)
        remedy = f"set it to {default} in scheduler_config.json" if component == "scheduler" else f"take one with {default}"
        raise ValueError(f"model.path: the {component}'s {key} {value!r} is not supported; {REASONS.get(key, remedy)}")


def check_network(component: str, core: Any, *, added: Collection[str | None]) -> None:
    """Raises ValueError, naming model.path, for a network that asks for an input of which a pipeline's call here knows nothing.

    added: the values of addition_embed_type that its family's call gives the inputs of.
    """
    kind = next((kind.__name__ for kind in type(core).__mro__ if kind.__name__ in NETWORKS), None)
    if kind is None:
        raise ValueError(f"model.path: a {component} {type(core).__name__} is not supported; take {', '.join(NETWORKS)}")
    check_keys(component, core, NETWORKS[kind], ALLOWED.get(kind, {}) | {"addition_embed_type": added})
