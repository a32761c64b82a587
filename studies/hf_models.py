"""Make tiny configurations of transformers' models, the models, and batches for their tasks."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from studies.hf_vision import WHOLE, token_settings, vision_settings, with_images

VOCABULARY, LENGTH, IMAGE, CHANNELS = 120, 16, 32, 3

_SMALL: dict[str, Any] = dict(
    hidden_size=32, d_model=32, n_embd=32, dim=32, emb_dim=32, embedding_size=32, num_hidden_layers=2, n_layer=2,
    n_layers=2, num_layers=2, encoder_layers=2, decoder_layers=2, num_decoder_layers=2, num_attention_heads=4, n_head=4,
    n_heads=4, num_heads=4, encoder_attention_heads=4, decoder_attention_heads=4, num_key_value_heads=2,
    intermediate_size=48, ffn_dim=48, d_ff=48, n_inner=48, hidden_dim=48, d_inner=48, encoder_ffn_dim=48,
    decoder_ffn_dim=48, vocab_size=VOCABULARY, max_position_embeddings=64, n_positions=64, n_ctx=64, head_dim=8, d_kv=8,
    d_head=8, state_size=4, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
    moe_intermediate_size=16, shared_expert_intermediate_size=16, num_local_experts=4, num_experts=4,
    n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    first_k_dense_replace=1, sliding_window=8, attention_window=4, linear_key_head_dim=8, linear_value_head_dim=8,
    linear_num_key_heads=2, linear_num_value_heads=4, word_embed_proj_dim=32, rotary_dim=8, mamba_d_state=4,
    mamba_dt_rank=4, mamba_n_heads=4, mamba_d_head=8, n_mamba_heads=2, hidden_size_per_layer_input=8,
    vocab_size_per_layer_input=VOCABULARY, decoder_start_token_id=1, image_size=IMAGE, patch_size=8, num_channels=3,
    num_mel_bins=16, max_source_positions=64, max_target_positions=64, encoder_layerdrop=0.0, decoder_layerdrop=0.0,
    classifier_proj_size=16, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4, projection_dim=16,
    depth_multiplier=0.25, decoder_hidden_size=16, fusion_hidden_size=16, layerdrop=0.0, ffn_hidden_size=48,
    encoder_stride=8,
)  # fmt: skip
_LATENT = ("deepseek_v2", "deepseek_v3", "axk1", "axk2", "minicpm3", "youtu", "longcat_flash", "esmc")
_HEAD_OF_8 = ("ministral", "hunyuan_v1_moe", "hunyuan_v1_dense", "hunyuan_vl", "hunyuan_vl_text")
_STAGES = dict(depths=[1, 1, 1, 1], hidden_sizes=[8, 16, 24, 32])
_SPEECH = dict(conv_dim=(16, 16, 16), conv_kernel=(10, 3, 3), conv_stride=(5, 2, 2), num_feat_extract_layers=3)
_SPECIAL: dict[str, dict[str, Any]] = WHOLE | {
    **{kind: {"num_key_value_heads": 4} for kind in _LATENT}, **{kind: {"head_dim": 8} for kind in _HEAD_OF_8},
    "deberta": dict(pos_att_type=["c2p", "p2c"], relative_attention=True, max_relative_positions=16),
    "deberta-v2": dict(pos_att_type=["c2p", "p2c"], relative_attention=True, position_buckets=8),
    "funnel": dict(block_sizes=[1, 1], num_decoder_layers=1),
    "big_bird": dict(attention_type="original_full"), "bigbird_pegasus": dict(attention_type="original_full"),
    "reformer": dict(
        attn_layers=["local", "local"], axial_pos_shape=[4, 4], axial_pos_embds_dim=[16, 16], attention_head_size=8,
        local_attn_chunk_length=4, feed_forward_size=48, is_decoder=False, max_position_embeddings=16,
    ),
    "canine": dict(num_hash_buckets=32, downsampling_rate=2, local_transformer_stride=4, upsampling_kernel_size=4),
    "convbert": dict(embedding_size=16, conv_kernel_size=3, head_ratio=2, num_groups=1),
    "mobilebert": dict(embedding_size=16, true_hidden_size=16, intra_bottleneck_size=16, num_feedforward_networks=2),
    "squeezebert": dict(q_groups=2, k_groups=2, v_groups=2, intermediate_groups=2, output_groups=2),
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]], window_size=4), "mpt": dict(max_seq_len=64),
    "nystromformer": dict(segment_means_seq_len=16, num_landmarks=16, conv_kernel_size=5), "mra": dict(block_per_row=2),
    "xmod": dict(languages=["en_XX"], default_language="en_XX"), "luke": dict(entity_vocab_size=10, entity_emb_size=8),
    "rwkv": dict(attention_hidden_size=32, context_length=64),
    "mamba2": dict(num_heads=8, head_dim=8, n_groups=2, chunk_size=8, expand=2),
    "esm": dict(pad_token_id=1, vocab_size=VOCABULARY, mask_token_id=3, position_embedding_type="rotary",
                emb_layer_norm_before=False),
    "lilt": dict(hidden_size=48, channel_shrink_ratio=4, max_2d_position_embeddings=64),
    "nemotron": dict(num_key_value_heads=2),
    "layoutlmv3": dict(coordinate_size=6, shape_size=4, input_size=32, visual_embed=False),
    "falcon": dict(num_kv_heads=2, new_decoder_architecture=True),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1,
                  use_mamba_kernels=False),
    "swin": dict(patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4),
    "swinv2": dict(patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4),
    "resnet": dict(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"),
    "regnet": dict(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], groups_width=4),
    "convnext": _STAGES, "convnextv2": _STAGES, "poolformer": _STAGES,
    "segformer": dict(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], num_attention_heads=[1, 2, 2, 4]),
    "mobilevit": dict(hidden_sizes=[16, 20, 24], neck_hidden_sizes=[4, 8, 8, 12, 12, 16, 32]),
    "mobilenet_v1": dict(min_depth=8), "mobilenet_v2": dict(min_depth=8, image_size=64),
    "beit": dict(num_hidden_layers=4, out_indices=[1, 2, 3, 4], pool_scales=[1, 2], auxiliary_channels=8),
    "data2vec-vision": dict(num_hidden_layers=4, out_indices=[1, 2, 3, 4], pool_scales=[1, 2], auxiliary_channels=8),
    "dpt": dict(num_hidden_layers=4, backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8, 8, 16, 16],
                auxiliary_loss_weight=0.4),
    "bit": dict(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_groups=4),
    "focalnet": dict(patch_size=4, embed_dim=16, depths=[1, 1], focal_levels=[2, 2], focal_windows=[3, 3]),
    "levit": dict(image_size=64, hidden_sizes=[16, 24, 32], num_attention_heads=[2, 3, 4], depths=[1, 1, 1],
                  key_dim=[8, 8, 8]),
    "audio-spectrogram-transformer": dict(max_length=48, num_mel_bins=16, patch_size=8, frequency_stride=8,
                                          time_stride=8),
    "whisper": dict(suppress_tokens=[], begin_suppress_tokens=[], max_source_positions=20),
    "wav2vec2-bert": dict(feature_projection_input_dim=16, conv_depthwise_kernel_size=5),
    "yolos": dict(image_size=[32, 32], num_detection_tokens=4),
    "videomae": dict(image_size=16, num_frames=4), "timesformer": dict(image_size=16, num_frames=4),
    "sew": dict(squeeze_factor=2), "sew-d": dict(squeeze_factor=2),
}  # fmt: skip
_IS_SPEECH = ("wav2vec2", "hubert", "wavlm", "unispeech", "unispeech-sat", "sew", "sew-d", "data2vec-audio",
              "wav2vec2-conformer")  # fmt: skip
# configurations within the configuration of a model of several parts
_SUB = ("text_config", "vision_config", "audio_config", "encoder", "decoder", "qformer_config", "backbone_config")


def _settings(config: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Return those of the small settings that a configuration has, under the configuration's own names."""
    names = getattr(type(config), "attribute_map", {}) or {}
    found = {}
    for key, value in given.items():
        own = names.get(key, key)
        try:
            usual = getattr(config, own, None)
        except Exception:  # raised by transformers if the setting differs from layer to layer
            continue
        if isinstance(usual, (int, float, str)) and not isinstance(usual, bool):
            found[own] = value
    return found


def tiny_config(kind: str, labels: int | None) -> Any:
    """Return a configuration of a model type, as small as the names of its settings allow."""
    maker = CONFIG_MAPPING[kind]
    usual = maker()
    settings = _settings(usual, _SMALL) | _SPECIAL.get(kind, {})
    if kind in _IS_SPEECH:
        settings |= _SPEECH
    if kind == "funnel":
        settings.pop("num_layers", None), settings.pop("num_hidden_layers", None)
    if isinstance(getattr(usual, "layer_types", None), list):
        settings["layer_types"] = (list(dict.fromkeys(usual.layer_types)) * 2)[:2]
    if labels is not None:
        settings["num_labels"] = labels
    for part in _SUB:
        inner = getattr(usual, part, None)
        if inner is not None and hasattr(inner, "to_dict"):
            own = _settings(inner, _SMALL) | _SPECIAL.get(inner.model_type, {})
            if isinstance(getattr(inner, "layer_types", None), list):
                own["layer_types"] = (list(dict.fromkeys(inner.layer_types)) * 2)[:2]
            settings[part] = {"model_type": inner.model_type, **own, **vision_settings(kind, part, inner)}
    settings |= token_settings(usual, VOCABULARY)
    config = _made(maker, settings)
    if getattr(config, "pad_token_id", 0) is None:
        config.pad_token_id = 0
    for name, value in (("use_cache", False), ("decoder_start_token_id", 1)):
        if getattr(config, name, value) in (None, True):
            setattr(config, name, value)
    return config


def tiny_model(name: str, config: Any, most: int) -> nn.Module:
    """Return a model of a class, with its zeros and ones moved; ValueError if it has more than ``most`` parameters."""
    model_class = getattr(transformers, name)
    with torch.device("meta"):
        size = sum(p.numel() for p in model_class(copy.deepcopy(config)).parameters())
    if size > most:
        raise ValueError(f"{size} parameters: not tiny")
    model = model_class(config)
    with torch.no_grad():
        for parameter in model.parameters():  # some heads start at zero, and norms at one
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def _made(maker: Any, settings: dict[str, Any]) -> Any:
    for _ in range(20):
        try:
            return maker(**settings)
        except AttributeError as error:  # a property that this configuration does not let one set
            name = re.search(r"property '(\w+)' of", str(error))
            if not name or name[1] not in settings:
                raise
            settings.pop(name[1])
    raise ValueError("no configuration")


def _tokens(batch: int, config: Any) -> dict[str, Tensor]:
    """Return sequences padded to one length; the first is full."""
    lengths = torch.randint(LENGTH // 2, LENGTH + 1, (batch,))
    lengths[0] = LENGTH
    mask = (torch.arange(LENGTH)[None] < lengths[:, None]).long()
    ids = torch.randint(5, VOCABULARY - 10, (batch, LENGTH)) * mask
    ids[torch.arange(batch), lengths - 1] = 2
    return {"input_ids": ids, "attention_mask": mask}


def _lm(batch: int, config: Any) -> dict[str, Tensor]:
    found = _tokens(batch, config)
    return found | {"labels": found["input_ids"].masked_fill(found["attention_mask"] == 0, -100)}


def _masked(batch: int, config: Any) -> dict[str, Tensor]:
    found = _lm(batch, config)
    found["labels"] = found["labels"].masked_fill(torch.rand(found["labels"].shape) < 0.7, -100)
    found["labels"][:, 1] = 7  # every sample has at least one label
    return found


def _seq2seq(batch: int, config: Any) -> dict[str, Tensor]:
    return _tokens(batch, config) | {"labels": _lm(batch, config)["labels"]}


def _classes(batch: int, config: Any) -> dict[str, Tensor]:
    return _tokens(batch, config) | {"labels": torch.randint(0, config.num_labels, (batch,))}


def _column(batch: int, config: Any) -> dict[str, Tensor]:
    return _tokens(batch, config) | {"labels": torch.randint(0, config.num_labels, (batch, 1))}


def _several(batch: int, config: Any) -> dict[str, Tensor]:
    return _tokens(batch, config) | {"labels": torch.randint(0, 2, (batch, config.num_labels)).float()}


def _numbers(batch: int, config: Any) -> dict[str, Tensor]:
    return _tokens(batch, config) | {"labels": 10 * torch.randn(batch, config.num_labels)}


def _number(batch: int, config: Any) -> dict[str, Tensor]:
    return _tokens(batch, config) | {"labels": torch.randn(batch)}


def _per_token(batch: int, config: Any) -> dict[str, Tensor]:
    found = _tokens(batch, config)
    labels = torch.randint(0, config.num_labels, found["input_ids"].shape)
    return found | {"labels": labels.masked_fill(found["attention_mask"] == 0, -100)}


def _spans(batch: int, config: Any) -> dict[str, Tensor]:
    """Return starts and ends of answers; one end lies outside and does not count."""
    starts, ends = torch.randint(0, 8, (batch,)), torch.randint(0, 8, (batch,))
    ends[-1] = 99
    return _tokens(batch, config) | {"start_positions": starts, "end_positions": ends}


def _choices(batch: int, config: Any) -> dict[str, Tensor]:
    rows = [_tokens(batch, config) for _ in range(3)]
    found = {name: torch.stack([row[name] for row in rows], 1) for name in rows[0]}
    return found | {"labels": torch.randint(0, 3, (batch,))}


def _pretraining(batch: int, config: Any) -> dict[str, Tensor]:
    return _masked(batch, config) | {"next_sentence_label": torch.randint(0, 2, (batch,))}


def _images(batch: int, config: Any) -> Tensor:
    size = getattr(config, "image_size", IMAGE)
    vision = getattr(config, "vision_config", None)
    size = getattr(vision, "image_size", size)
    height, width = (size, size) if isinstance(size, int) else size
    return torch.randn(batch, CHANNELS, height, width)


def _image_classes(batch: int, config: Any) -> dict[str, Tensor]:
    return {"pixel_values": _images(batch, config), "labels": torch.randint(0, config.num_labels, (batch,))}


def _segments(batch: int, config: Any) -> dict[str, Tensor]:
    labels = torch.randint(0, config.num_labels, (batch, 16, 16))
    labels[torch.rand(labels.shape) < 0.2] = 255
    return {
        "pixel_values": torch.randn(batch, 3, 64, 64) if config.model_type != "beit" else _images(batch, config),
        "labels": labels,
    }


def _rebuilt(batch: int, config: Any) -> dict[str, Tensor]:
    patches = (config.image_size // config.patch_size) ** 2
    return {"pixel_values": _images(batch, config), "bool_masked_pos": torch.rand(batch, patches) < 0.5}


def _videos(batch: int, config: Any) -> dict[str, Tensor]:
    frames = torch.randn(batch, 4, CHANNELS, config.image_size, config.image_size)
    return {"pixel_values": frames, "labels": torch.randint(0, config.num_labels, (batch,))}


def _sounds(batch: int, config: Any) -> dict[str, Tensor]:
    labels = torch.randint(0, config.num_labels, (batch,))
    if config.model_type == "whisper":
        return {"input_features": torch.randn(batch, 16, 40), "labels": labels}
    if config.model_type == "wav2vec2-bert":
        return {"input_features": torch.randn(batch, 20, 16), "labels": labels}
    if config.model_type == "audio-spectrogram-transformer":
        return {"input_values": torch.randn(batch, 48, 16), "labels": labels}
    return {"input_values": torch.randn(batch, 800), "labels": labels}


def _transcripts(batch: int, config: Any) -> dict[str, Tensor]:
    return {**_sounds(batch, config), "labels": torch.randint(1, 10, (batch, 4))}


def _captions(batch: int, config: Any) -> dict[str, Tensor]:
    return with_images(_lm(batch, config), _images(batch, config), config)


def _spoken(batch: int, config: Any) -> dict[str, Tensor]:
    labels = _lm(batch, config)["labels"]
    return {"input_features": torch.randn(batch, 16, 40), "labels": labels}


def _answers(batch: int, config: Any) -> dict[str, Tensor]:
    return _several(batch, config) | {"pixel_values": _images(batch, config)}


def _boxes(batch: int, config: Any) -> dict[str, Any]:
    labels = [{"class_labels": torch.randint(0, 4, (2,)), "boxes": 0.2 + 0.3 * torch.rand(2, 4)} for _ in range(batch)]
    return {"pixel_values": _images(batch, config), "labels": labels}


def _pairs(batch: int, config: Any) -> dict[str, Any]:
    return _tokens(batch, config) | {"pixel_values": _images(batch, config), "return_loss": True}


@dataclass
class Family:
    """Model classes of one task: the name of transformers' list of them, their batch, and settings to change."""

    mapping: str
    batch: Callable[[int, Any], dict[str, Any]]
    labels: int | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def classes(self) -> list[tuple[str, str]]:
        found = getattr(modeling_auto, f"MODEL_FOR_{self.mapping}_MAPPING_NAMES", None)
        found = getattr(modeling_auto, f"MODEL_{self.mapping}_MAPPING_NAMES", {}) if found is None else found
        return [
            (kind, each) for kind, names in found.items() for each in ((names,) if isinstance(names, str) else names)
        ]


FAMILIES = {
    "ForCausalLM": Family("CAUSAL_LM", _lm, options={"is_decoder": True}),
    "ForMaskedLM": Family("MASKED_LM", _masked),
    "ForSeq2SeqLM": Family("SEQ_TO_SEQ_CAUSAL_LM", _seq2seq),
    "ForSequenceClassification": Family("SEQUENCE_CLASSIFICATION", _classes, 5),
    "labels (B, 1)": Family("SEQUENCE_CLASSIFICATION", _column, 5),
    "multi-label": Family("SEQUENCE_CLASSIFICATION", _several, 3, {"problem_type": "multi_label_classification"}),
    "regression, 3 outputs": Family("SEQUENCE_CLASSIFICATION", _numbers, 3, {"problem_type": "regression"}),
    "regression, 1 output": Family("SEQUENCE_CLASSIFICATION", _number, 1),
    "ForTokenClassification": Family("TOKEN_CLASSIFICATION", _per_token, 5),
    "ForQuestionAnswering": Family("QUESTION_ANSWERING", _spans),
    "ForMultipleChoice": Family("MULTIPLE_CHOICE", _choices),
    "ForNextSentencePrediction": Family("NEXT_SENTENCE_PREDICTION", _classes, 2),
    "ForPreTraining": Family("PRETRAINING", _pretraining),
    "ForImageClassification": Family("IMAGE_CLASSIFICATION", _image_classes, 5),
    "ForMaskedImageModeling": Family("MASKED_IMAGE_MODELING", _rebuilt),
    "ForSemanticSegmentation": Family("SEMANTIC_SEGMENTATION", _segments, 5),
    "ForVideoClassification": Family("VIDEO_CLASSIFICATION", _videos, 5),
    "ForAudioClassification": Family("AUDIO_CLASSIFICATION", _sounds, 5),
    "ForAudioXVector": Family("AUDIO_XVECTOR", _sounds, 5),
    "ForSpeechSeq2Seq": Family("SPEECH_SEQ_2_SEQ", _spoken),
    "ForDocumentQuestionAnswering": Family("DOCUMENT_QUESTION_ANSWERING", _spans),
    "ForVisualQuestionAnswering": Family("VISUAL_QUESTION_ANSWERING", _answers, 3),
    "ForObjectDetection": Family("OBJECT_DETECTION", _boxes, 4),
    "ForCTC": Family("CTC", _transcripts),
    "ForImageTextToText": Family("IMAGE_TEXT_TO_TEXT", _captions),
    "ForZeroShotImageClassification": Family("ZERO_SHOT_IMAGE_CLASSIFICATION", _pairs),
}
