"""Make tiny vision-language models: settings of their parts, and the inputs that their processors would produce.

Legend: B batch, n image tokens per sample, p patch size, t frames per patch, m x m patches are merged into one token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["token_settings", "vision_settings", "with_images"]

_TOKENS = {  # distance from the end of the vocabulary; ordinary tokens stay 10 away from it
    "image_token_id": 1, "image_token_index": 1, "video_token_id": 2, "video_token_index": 2,
    "vision_start_token_id": 3, "vision_end_token_id": 4, "image_start_token_id": 3, "image_end_token_id": 4,
    "video_start_token_id": 5, "video_end_token_id": 6, "audio_token_id": 7,
}  # fmt: skip
_GRID = dict(  # for vision transformers that take the patches of all images in one sequence, and their grids
    depth=2, embed_dim=32, hidden_size=32, num_heads=4, intermediate_size=48, patch_size=4, spatial_merge_size=2,
    out_hidden_size=32, window_size=16, num_hidden_layers=2, num_attention_heads=4, num_position_embeddings=16,
    image_size=16, pos_emb_height=4, pos_emb_width=4, num_key_value_heads=2,
)  # fmt: skip
_LISTS = {"fullatt_block_indexes": [1], "deepstack_visual_indexes": [0, 1]}
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
_MROPE_HALF = _MROPE | {"mrope_section": [1, 1, 0]}  # of which half is rotated
_HALF = ("glm4v_moe", "glm_ocr", "glmga")
_VIDEO = ("kimi_k25", "paddleocr_vl", "video_llama_3")  # take patches as (rows, channels, p, p)
GRID = (
    "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "glm4v", "glm4v_moe", "glm46v",
    "glmga", "glm_ocr", "paddleocr_vl", "video_llama_3", "exaone4_5", "hyperclovax_vision_v2", "ernie4_5_vl_moe",
    "minimax_m3_vl", "kimi_k25", "lfm3_vl", "cosmos3_omni", "cosmos3_edge", "glm5_next", "qwen2_5_omni_thinker",
)  # fmt: skip
SIDE = 4  # patches per side of an image in a grid
# image tokens per sample, if that is not the number of patches
_COUNTS = {
    "aya_vision": 4, "got_ocr2": 1, "pp_chart2table": 1, "step3p7": 1, "gemma3": 4, "shieldgemma2": 4, "idefics2": 64,
    "idefics3": 4, "smolvlm": 4, "mistral3": 4, "lighton_ocr": 4, "mistral_large4": 4, "internvl": 4, "qianfan_ocr": 4,
    "llava_next": 36, "llava_next_video": 36, "llava_onevision": 36, "lfm2_vl": 4, "aria": 4, "blip-2": 4,
    "instructblip": 4, "instructblipvideo": 16,
}  # fmt: skip
_SEVERAL = ("idefics", "idefics2", "idefics3", "smolvlm", "llava_next", "llava_next_video", "llava_onevision")
_TILED = {"llava_next": 2, "llava_next_video": 2, "llava_onevision": 2}  # images per sample, if more than one
_SIZED = ("mistral3", "lighton_ocr", "mistral_large4", *_TILED)
_PATCHES = ("fuyu", "lfm2_vl")  # take (B, patches, numbers)
_QUERIES = {"image_token_index": 119, "num_query_tokens": 4}
WHOLE: dict[str, dict[str, Any]] = {  # settings of the whole model, besides those of its parts
    "kimi_k25": {"projection_hidden_size": 32}, "paligemma": {"projection_dim": 32},
    "gemma3": {"mm_tokens_per_image": 4}, "shieldgemma2": {"mm_tokens_per_image": 4},
    "aria": {"projector_patch_to_query_dict": {16: 4}}, "vipllava": {"vision_feature_layers": [-1, 0]},
    "blip-2": _QUERIES, "instructblip": _QUERIES, "instructblipvideo": _QUERIES,
    **{kind: {"image_grid_pinpoints": [[32, 32]]} for kind in _TILED},
}  # fmt: skip


def token_settings(config: Any, vocabulary: int) -> dict[str, int]:
    """Return the special tokens that a configuration has, moved into the vocabulary."""
    return {name: vocabulary - back for name, back in _TOKENS.items() if isinstance(getattr(config, name, None), int)}


def vision_settings(kind: str, part: str, config: Any) -> dict[str, Any]:
    """Return further settings for a part of a vision-language model's configuration."""
    if kind in GRID and part == "vision_config":
        found = {name: value for name, value in _GRID.items() if isinstance(getattr(config, name, None), int)}
        return found | {name: value for name, value in _LISTS.items() if hasattr(config, name)}
    if kind in GRID and part == "text_config" and isinstance(getattr(config, "rope_parameters", None), dict):
        rope = _MROPE_HALF if kind in _HALF else _MROPE
        rope = rope | {"mrope_section": [1, 1, 2]} if kind == "ernie4_5_vl_moe" else rope
        return {"rope_parameters": rope} if "rope_type" in config.rope_parameters else {}
    if kind in ("internvl", "qianfan_ocr") and part == "vision_config":
        return {"image_size": [32, 32], "patch_size": [8, 8]}
    if kind == "paligemma" and part == "vision_config":
        return {"projection_dim": 32}
    return {}


def with_images(found: dict[str, Tensor], images: Tensor, config: Any) -> dict[str, Any]:
    """Return a batch of token sequences with an image in front of each; image tokens are not labels."""
    kind = config.model_type
    token = getattr(config, "image_token_id", getattr(config, "image_token_index", None))
    if kind in GRID:
        return _with_grids(found, config, token)
    if isinstance(token, int) and not isinstance(token, bool):
        found = _with_tokens(found, token, _COUNTS.get(kind) or _patches(config))
    return found | {"pixel_values": _laid_out(images, kind)} | _extras(found, images, kind)


def _laid_out(images: Tensor, kind: str) -> Tensor:
    batch = len(images)
    if kind in _SEVERAL:
        return images[:, None].repeat(1, _TILED.get(kind, 1), 1, 1, 1)
    if kind in _PATCHES:
        return torch.randn(batch, 16, 192)
    return images[:, None].repeat(1, 4, 1, 1, 1) if kind == "instructblipvideo" else images


def _extras(found: dict[str, Tensor], images: Tensor, kind: str) -> dict[str, Tensor]:
    batch = len(images)
    if kind in _SIZED:
        return {"image_sizes": torch.tensor([list(images.shape[-2:])] * batch)}
    if kind == "lfm2_vl":
        return {
            "spatial_shapes": torch.tensor([[4, 4]] * batch),
            "pixel_attention_mask": torch.ones(batch, 16, dtype=torch.int64),
        }
    if kind == "idefics":
        return {"image_attention_mask": torch.ones(*found["input_ids"].shape, 1, dtype=torch.int64)}
    if kind in ("instructblip", "instructblipvideo"):
        return {"qformer_input_ids": found["input_ids"][:, :4].clamp(max=100)}
    return {}


def _patches(config: Any) -> int:
    vision = getattr(config, "vision_config", config)
    size, patch = getattr(vision, "image_size", 32), getattr(vision, "patch_size", 8)
    size, patch = (each[0] if isinstance(each, (tuple, list)) else each for each in (size, patch))
    return (size // patch) ** 2


def _with_tokens(found: dict[str, Tensor], token: int, number: int) -> dict[str, Tensor]:
    ids = torch.full((len(found["input_ids"]), number), token)
    first = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.full_like(ids, -100)}
    return {name: torch.cat([first[name], found[name]], 1) for name in first}


def _with_grids(found: dict[str, Tensor], config: Any, token: int) -> dict[str, Tensor]:
    """Return a batch as for Qwen2-VL: the patches of all images in one sequence, and each (frames, height, width)."""
    vision, batch = config.vision_config, len(found["input_ids"])
    merge = getattr(vision, "spatial_merge_size", 2)
    patch, frames = vision.patch_size, getattr(vision, "temporal_patch_size", 1)
    rows = batch * SIDE * SIDE
    if config.model_type in _VIDEO:
        pixels = torch.randn(rows, 3, patch, patch)
    else:
        pixels = torch.randn(rows, 3 * frames * patch * patch)
    found = _with_tokens(found, token, (SIDE // merge) ** 2)
    grid = torch.tensor([[1, SIDE, SIDE]] * batch)
    kinds = (found["input_ids"] == token).long()
    merges = {"image_merge_sizes": torch.full((batch,), merge)} if config.model_type == "video_llama_3" else {}
    return found | {"pixel_values": pixels, "image_grid_thw": grid, "mm_token_type_ids": kinds} | merges
