# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""What the models share: the adaLN-Zero block of DiT, embeddings, positions, checks of what comes in.

Shapes:
    B batch, N tokens, D width, A heads
"""

import math
from functools import lru_cache

import torch
import torch._dynamo
import torch.nn.functional as F
from diffusers.models import attention
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import TimestepEmbedding, Timesteps, get_2d_sincos_pos_embed_from_grid
from torch import nn

from ..limits import can_be_read, is_traced


FREQUENCY_SIZE = 256  # width of the sinusoidal embedding that precedes the timestep MLP, as in the original DiT


_LABEL_STD = 0.02  # of a new table of labels
_SHORT_SEQUENCE = 256  # tokens up to which attention written out trains faster on a CPU in half precision


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Softmax attention written out: query, key, value (..., N, D / A), bias that broadcasts to (..., N, N)."""
    scores = torch.matmul(query * query.shape[-1] ** -0.5, key.mT)
    if bias is not None:
        scores = scores + bias.to(query.dtype)
    return torch.matmul(scores.softmax(dim=-1), value)


class SelfAttentionProcessor:
    """Multi-head self-attention; where tokens attend to is the module's, all of them or those of their window.

    One processor serves every attention of a model: `model.set_attn_processor(SelfAttentionProcessor())`.
    """

    _attention_backend = None
    _parallel_config = None

    def __call__(self, attn: "SelfAttention", hidden_states: torch.Tensor, *layout) -> torch.Tensor:
        query, key, value = attn.project(hidden_states)  # each (..., A, D / A)
        return attn.to_out[0](attn.attend(query, key, value, *layout).flatten(-2))


def _trains_faster_written_out(query: torch.Tensor) -> bool:
    is_half = query.dtype in (torch.bfloat16, torch.float16)
    return query.requires_grad and query.device.type == "cpu" and is_half and query.shape[1] <= _SHORT_SEQUENCE


class SelfAttention(nn.Module, AttentionModuleMixin):
    """Self-attention with separate `to_q`, `to_k`, `to_v` (what LoRA targets), fused on request.

    Args:
        dim: width D.
        heads: number of heads A; divides D.
    """

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.use_bias = True
        self.is_cross_attention = False
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        self.set_processor(SelfAttentionProcessor())

    def project(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query, key and value, each (..., N, A, D / A)."""
        if self.fused_projections:
            qkv = self.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            qkv = self.to_q(hidden_states), self.to_k(hidden_states), self.to_v(hidden_states)
        query, key, value = (x.unflatten(-1, (self.heads, -1)) for x in qkv)
        return query, key, value

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Each (B, N, A, D / A) -> the same, through the attention backend of diffusers that the processor names.

        Written out where nobody chose a backend and the backward pass of torch's own is slow: in half precision on a
        CPU it takes up to eight times as long for a few dozen tokens, and evens out at several hundred.
        """
        backend = self.processor._attention_backend
        if backend is None and _trains_faster_written_out(query):
            return attend(*(x.transpose(1, 2) for x in (query, key, value))).transpose(1, 2)
        parallel = self.processor._parallel_config
        return dispatch_attention_fn(query, key, value, backend=backend, parallel_config=parallel)

    def set_processor(self, processor: SelfAttentionProcessor) -> None:
        """As of diffusers.

        Raises:
            ValueError: it is a processor for another kind of attention.
        """
        if not isinstance(processor, SelfAttentionProcessor):
            raise ValueError(f"`processor` must be a SelfAttentionProcessor, got {type(processor).__name__}.")
        super().set_processor(processor)

    def forward(self, hidden_states: torch.Tensor, *layout) -> torch.Tensor:
        return self.processor(self, hidden_states, *layout)


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """The tanh-approximated GELU.

    Compiled for a CPU it is written with the sigmoid that it equals, (1 + tanh(u)) / 2 = sigmoid(2u): the kernel of
    tanh takes twice as long, forward and backward.
    """
    if not (torch.compiler.is_compiling() and x.device.type == "cpu"):
        return F.gelu(x, approximate="tanh")
    y = x.float()
    return (y * torch.sigmoid(math.sqrt(8 / math.pi) * (y + 0.044715 * y * y * y))).to(x.dtype)


class FeedForward(attention.FeedForward):
    """Two linear layers with a tanh-approximated GELU between, as in DiT; of diffusers' kind, which its hooks find."""

    def __init__(self, dim: int, mlp_ratio: float):
        nn.Module.__init__(self)
        self.linear_1 = nn.Linear(dim, int(dim * mlp_ratio))
        self.linear_2 = nn.Linear(int(dim * mlp_ratio), dim)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.linear_2(gelu_tanh(self.linear_1(hidden_states)))


class DiTBlock(nn.Module):
    """Transformer block with adaLN-Zero conditioning (Peebles and Xie, arXiv:2212.09748).

    Args:
        dim: width D.
        heads: number of heads.
        mlp_ratio: hidden width of the feed-forward over D.
        attn: attention over the tokens; None for plain self-attention.
    """

    def __init__(self, dim: int, heads: int, mlp_ratio: float = 4.0, attn: nn.Module | None = None):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn = SelfAttention(dim, heads) if attn is None else attn
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.ff = FeedForward(dim, mlp_ratio)
        self.adaln = nn.Linear(dim, 6 * dim)

    def forward(
        self,
        hidden_states: torch.Tensor,
        conditioning: torch.Tensor,
    ) -> torch.Tensor:
        """hidden_states (B, N, D), conditioning (B, D) after its SiLU -> (B, N, D)."""
        return self.modulated(hidden_states, self.adaln(conditioning)[:, None])

    def modulated(self, hidden_states: torch.Tensor, modulation: torch.Tensor, *attn_args) -> torch.Tensor:
        """The block under a modulation (..., 6 * D) that broadcasts to the tokens (..., D)."""
        shift_attn, scale_attn, gate_attn, shift_ff, scale_ff, gate_ff = modulation.chunk(6, dim=-1)
        attended = self.attn(modulate(self.norm1(hidden_states), shift_attn, scale_attn), *attn_args)
        hidden_states = torch.addcmul(hidden_states, gate_attn, attended)
        fed = self.ff(modulate(self.norm2(hidden_states), shift_ff, scale_ff))
        return torch.addcmul(hidden_states, gate_ff, fed)


class FinalLayer(nn.Module):
    """The last layer of DiT: modulated LayerNorm and a linear map to `out_features`.

    Args:
        dim: width D of the tokens.
        out_features: what each becomes.
        conditioning_dim: width of the conditioning; None for D.
    """

    def __init__(self, dim: int, out_features: int, conditioning_dim: int | None = None):
        super().__init__()
        self.norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.adaln = nn.Linear(conditioning_dim or dim, 2 * dim)
        self.proj_out = nn.Linear(dim, out_features)

    def forward(
        self, hidden_states: torch.Tensor, conditioning: torch.Tensor, images: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Tokens (M, N, D) to (M, N, out_features).

        Args:
            hidden_states: (M, N, D).
            conditioning: (B, D) after its SiLU.
            images: (M,) int64, which row of the conditioning is that of each N tokens; None where M is B.
        """
        modulation = self.adaln(conditioning)  # (B, 2 * D)
        modulation = modulation if images is None else modulation.index_select(0, images)
        shift, scale = modulation[:, None].chunk(2, dim=-1)  # (M, 1, D)
        return self.proj_out(modulate(self.norm(hidden_states), shift, scale))


def run_block(net: nn.Module, block: nn.Module, tokens: torch.Tensor, *args) -> torch.Tensor:
    """A block of a net, with its activations computed again in the backward pass if the net was asked for that."""
    if torch.is_grad_enabled() and net.gradient_checkpointing:
        return net._gradient_checkpointing_func(block, tokens, *args)
    return block(tokens, *args)


def of_any_size(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """The tensor, for which a compiled block that takes it makes one graph for all sizes of a dimension."""
    if not is_traced(tensor):
        torch._dynamo.maybe_mark_dynamic(tensor, dim)
    return tensor


def residual_stream(tokens: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Tokens in the dtype that blocks add to, where autocast leaves a choice: outside, it is that of the weights."""
    device = tokens.device.type
    return tokens.to(dtype) if device != "meta" and torch.is_autocast_enabled(device) else tokens


def modulate(hidden_states: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """hidden_states * (1 + scale) + shift, in one pass over the tokens."""
    return torch.addcmul(shift, hidden_states, 1 + scale)


class TimestepEmbedder(nn.Module):
    """Sinusoidal embedding of a scalar in [0, 1000] and an MLP to width D.

    Args:
        dim: width D.
        frequency_shift: frequency i is 10000 ** (-i / (128 - frequency_shift)). 0 is the original DiT; diffusers' own
            DiT uses 1, which moves outputs by 1e-2.
    """

    def __init__(self, dim: int, frequency_shift: float = 0.0):
        super().__init__()
        self.frequencies = Timesteps(FREQUENCY_SIZE, flip_sin_to_cos=True, downscale_freq_shift=frequency_shift)
        self.mlp = TimestepEmbedding(FREQUENCY_SIZE, dim)

    def forward(self, timestep: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """timestep (B,) -> (B, D), computed in the dtype of what flows through the model."""
        return self.mlp(self.frequencies(timestep).to(dtype))


class LabelEmbedder(nn.Embedding):
    """Class labels, with one more entry, index `num_classes`, for "no class": what guidance needs."""

    def __init__(self, num_classes: int, dim: int):
        super().__init__(num_classes + 1, dim)


class ClassLabelsMixin:
    """A model with `num_classes` in its configuration and a `label_embed`, which may learn other classes."""

    def start_new_classes(self, num_classes: int) -> None:
        """Begin a new table of labels; the row of "no class", and all other weights, stay.

        Raises:
            ValueError: `num_classes` is out of its range, or the model is unconditional.
        """
        if self.label_embed is None:
            raise ValueError("an unconditional model has no `label_embed` to begin anew.")
        self.check_config({**self.config, "num_classes": num_classes})
        old = self.label_embed.weight
        new = LabelEmbedder(num_classes, old.shape[1]).to(old.device, old.dtype)
        with torch.no_grad():
            nn.init.normal_(new.weight, std=_LABEL_STD)
            new.weight[-1] = old[-1]
        self.label_embed = new
        self.register_to_config(num_classes=num_classes)


def sincos_positions(size: tuple[int, int], tokens: torch.Tensor, patch_size: int = 1) -> torch.Tensor:
    """Fixed 2-D sine-cosine positions of DiT for a grid of tokens of any shape: (h * w, D), like `tokens` (B, N, D).

    Computed once for a grid, not at every step. Positions are token indices, not rescaled to the training size: a
    wider image has more positions, equally spaced. With a `patch_size` p tokens are cells on a grid of patches of
    p x p: row i lies at (i - (p - 1) / 2) / p, so that the mean row of the cells of a patch is the patch's own index.
    """
    compute = _sincos_positions if is_traced(tokens) else _kept_sincos_positions
    return compute(*size, tokens.shape[-1], tokens.device, tokens.dtype, patch_size)


def _sincos_positions(
    height: int, width: int, dim: int, device: torch.device, dtype: torch.dtype, patch_size: int
) -> torch.Tensor:
    with torch.inference_mode(False):  # what is kept must also serve a later training step
        rows = torch.arange(height, device=device, dtype=torch.float32)
        columns = torch.arange(width, device=device, dtype=torch.float32)
        grid = torch.stack(torch.meshgrid(columns, rows, indexing="xy"))  # the column comes first, as in DiT
        grid = (grid - (patch_size - 1) / 2) / patch_size
        return get_2d_sincos_pos_embed_from_grid(dim, grid, output_type="pt").to(dtype)


_kept_sincos_positions = lru_cache(maxsize=8)(_sincos_positions)


def init_dit_weights(module: nn.Module) -> None:
    """DiT's initialisation of a tree of modules: Xavier for linear maps, zero where adaLN-Zero starts as identity.

    Callers zero what is theirs (output projections) afterwards.
    """
    for child in module.modules():
        if isinstance(child, nn.Linear):
            nn.init.xavier_uniform_(child.weight)
            nn.init.zeros_(child.bias)
        elif isinstance(child, nn.Embedding):
            nn.init.normal_(child.weight, std=_LABEL_STD)
    for child in module.modules():
        if isinstance(child, TimestepEmbedding):
            nn.init.normal_(child.linear_1.weight, std=0.02)
            nn.init.normal_(child.linear_2.weight, std=0.02)
        elif isinstance(child, (DiTBlock, FinalLayer)):
            nn.init.zeros_(child.adaln.weight)
            nn.init.zeros_(child.adaln.bias)


def check_conditioning(
    hidden_states: torch.Tensor,
    channels: int,
    timestep: torch.Tensor | float | int,
    class_labels: torch.Tensor | None,
    num_classes: int | None,
) -> torch.Tensor:
    """Validate what every model takes besides its own, and return the timestep as a (B,) tensor on the same device.

    Raises:
        ValueError: the hidden states are not (B, channels, h, w); the timestep is neither a scalar nor (B,); labels
            are given to an unconditional model, missing for a conditional one, of a wrong shape or dtype, or outside
            0 ... num_classes.
    """
    if hidden_states.ndim != 4 or hidden_states.shape[1] != channels:
        raise ValueError(f"`hidden_states` must have shape (B, {channels}, h, w), got {tuple(hidden_states.shape)}.")
    batch_size = hidden_states.shape[0]
    timestep = torch.as_tensor(timestep, device=hidden_states.device)
    if timestep.ndim > 1 or (timestep.ndim == 1 and timestep.shape[0] not in (1, batch_size)):
        raise ValueError(f"`timestep` must be a scalar or have shape ({batch_size},), got {tuple(timestep.shape)}.")
    if num_classes is None:
        if class_labels is not None:
            raise ValueError("`class_labels` were given to an unconditional model (num_classes is None).")
    elif class_labels is None:
        raise ValueError(
            f"`class_labels` are required by this model: 0 to {num_classes - 1}, or {num_classes} for no class."
        )
    else:
        if class_labels.shape != (batch_size,) or class_labels.dtype != torch.int64:
            raise ValueError(
                f"`class_labels` must be int64 of shape ({batch_size},), got {class_labels.dtype} of shape"
                f" {tuple(class_labels.shape)}."
            )
        if can_be_read(class_labels):  # elsewhere the embedding itself fails on a bad index
            low, high = torch.aminmax(class_labels)
            if low < 0 or high > num_classes:
                raise ValueError(
                    f"`class_labels` must lie in 0 ... {num_classes} (no class), got {low.item()} to {high.item()}."
                )
    return timestep.expand(batch_size)
