"""Tiny random models of transformers, and what they are compared in."""

import torch
import transformers
from torch import Tensor

transformers.logging.set_verbosity_error()

_SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
_GROUPED = _SIZES | {"num_key_value_heads": 1}
# Each sequence of the inputs is longer than the windows.
_WINDOW = {"sliding_window": 5}
_MODELS = {
    "llama": ("Llama", _GROUPED),
    "mistral": ("Mistral", _GROUPED | _WINDOW),
    "gemma2": (
        "Gemma2",
        _GROUPED
        | _WINDOW
        | {"head_dim": 8, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 8},
    ),
    "gpt_oss": (
        "GptOss",
        _GROUPED
        | _WINDOW
        | {
            "head_dim": 8,
            "intermediate_size": 32,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
    "qwen2": ("Qwen2", _GROUPED | _WINDOW | {"use_sliding_window": True, "max_window_layers": 1}),
    "qwen3": ("Qwen3", _GROUPED | {"head_dim": 8}),
    "llama4": (
        "Llama4",
        _GROUPED
        | {
            "head_dim": 8,
            "intermediate_size_mlp": 32,
            "attention_chunk_size": 5,
            "num_local_experts": 2,
            "layer_types": ["chunked_attention", "full_attention"],
            "no_rope_layers": [1, 0],
        },
    ),
}
DECODERS = tuple(_MODELS)


def decoder(name: str, **more) -> torch.nn.Module:
    """A model that generates, in evaluation, with attention that is far from uniform."""
    torch.manual_seed(0)
    kind, options = _MODELS[name]
    config_kind = "Llama4Text" if name == "llama4" else kind
    config = getattr(transformers, f"{config_kind}Config")(**options | more)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "q_proj" in path or "k_proj" in path:
                parameter.mul_(12)
            if "sinks" in path:
                parameter.normal_(0, 2)
    return model.eval()


def encoder() -> torch.nn.Module:
    """BERT, in evaluation."""
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(**_SIZES))
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "query" in path or "key" in path:
                parameter.mul_(4)
    return model.eval()


def encoder_decoder(kind: str = "Bart") -> torch.nn.Module:
    """BART or T5, in evaluation."""
    torch.manual_seed(0)
    if kind == "T5":
        config = transformers.T5Config(
            vocab_size=64,
            d_model=16,
            d_kv=8,
            d_ff=32,
            num_layers=1,
            num_heads=2,
            relative_attention_num_buckets=8,
            relative_attention_max_distance=16,
            decoder_start_token_id=0,
        )
        return transformers.T5ForConditionalGeneration(config).eval()
    config = transformers.BartConfig(
        vocab_size=64,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        forced_eos_token_id=None,
    )
    model = transformers.BartForConditionalGeneration(config)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "q_proj" in path or "k_proj" in path:
                parameter.mul_(12)
    return model.eval()


LENGTH = 13
IDS = torch.randint(1, 64, (2, LENGTH), generator=torch.Generator().manual_seed(1))
NO_PADDING = torch.ones(2, LENGTH, dtype=torch.long)
RIGHT, LEFT, HOLES = (NO_PADDING.clone() for _ in range(3))
RIGHT[1, 8:] = 0
LEFT[1, :5] = 0
HOLES[0, 4:6] = HOLES[1, 7] = HOLES[1, 0] = 0
PADDINGS = {"none": None, "right": RIGHT, "left": LEFT, "holes": HOLES}


def logits(model, padding: Tensor | None = None, **more) -> list[Tensor]:
    """Those of all tokens that are no padding."""
    with torch.no_grad():
        found = model(input_ids=IDS, attention_mask=padding, **more).logits
    return [found if padding is None else found[padding.bool()]]


def gradients(model, padding: Tensor | None = None, **more) -> list[Tensor]:
    """Those of all parameters, of a loss that reads no padding."""
    model.zero_grad()
    found = model(input_ids=IDS, attention_mask=padding, **more).logits
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(3))
    if padding is not None:
        weights = weights * padding[..., None]
    (found * weights).sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def generated(model, padding: Tensor | None = None, new: int = 4, **more) -> list[Tensor]:
    """Logits and tokens of a greedy generation."""
    found = model.generate(
        input_ids=IDS,
        attention_mask=NO_PADDING if padding is None else padding,
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=0,
        **more,
    )
    return [torch.stack(found.logits), found.sequences.float()]


def error(found: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest difference, relative to each tensor's largest element."""
    top = max(float(w.abs().max()) for w in wanted)
    return max(
        float((a.float() - b.float()).abs().max() / max(float(b.abs().max()), 1e-2 * top))
        for a, b in zip(found, wanted, strict=True)
    )
