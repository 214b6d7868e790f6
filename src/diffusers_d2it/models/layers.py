# Copyright 2026 The diffusers-d2it authors. Licensed under the Apache License, Version 2.0.
"""What the grain model and the content model share: the adaLN-Zero block of DiT, embeddings, positions.

Shapes:
    B batch, N tokens, D width, A heads
"""

from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import TimestepEmbedding, Timesteps, get_2d_sincos_pos_embed_from_grid
from torch import nn

from .linear_stack import LinearStack, extras_of, state_of
from .plain_block import BlockWeights, is_torch_as_it_is, norm_modulate, plain_block


FREQUENCY_SIZE = 256  # width of the sinusoidal embedding that precedes the timestep MLP, as in the original DiT


class SelfAttentionProcessor:
    """Multi-head self-attention through diffusers' attention backends."""

    _attention_backend = None
    _parallel_config = None

    def __call__(self, attn: "SelfAttention", hidden_states: torch.Tensor) -> torch.Tensor:
        query, key, value = attn.project(hidden_states)
        hidden_states = dispatch_attention_fn(
            query, key, value, backend=self._attention_backend, parallel_config=self._parallel_config
        )
        return attn.to_out[0](hidden_states.flatten(-2))


class SelfAttention(nn.Module, AttentionModuleMixin):
    """Self-attention with separate `to_q`, `to_k`, `to_v` (what LoRA targets).

    Inside a model that is not learning they are one matrix product (`stack_projections`), unless
    `unfuse_qkv_projections` has forbidden it.

    Args:
        dim: width D.
        heads: number of heads A; divides D.
    """

    _default_processor_cls = SelfAttentionProcessor
    _available_processors = [SelfAttentionProcessor]
    fused_projections = True

    def __init__(self, dim: int, heads: int, processor=None):
        super().__init__()
        self.heads = heads
        self.use_bias = True
        self.is_cross_attention = False
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        self.qkv = LinearStack()
        self.set_processor(processor or self._default_processor_cls())

    def fuse_projections(self) -> None:
        """Allow one matrix product for query, key and value, as it is from the start."""
        self.fused_projections = True

    def unfuse_projections(self) -> None:
        """Always project with `to_q`, `to_k` and `to_v`."""
        self.fused_projections = False
        self.qkv.clear()

    def stack_projections(self, like: torch.Tensor) -> None:
        """Let the next `project` without gradients be one matrix product, if it can be for inputs `like` this."""
        if self.fused_projections:
            self.qkv.refresh((self.to_q, self.to_k, self.to_v), like)

    def project(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query, key and value, each (..., N, A, D / A)."""
        if self.qkv.is_ready:
            qkv = self.qkv(hidden_states)
            query, key, value = qkv.view(*qkv.shape[:-1], 3, self.heads, -1).unbind(-3)
        else:
            projected = self.to_q(hidden_states), self.to_k(hidden_states), self.to_v(hidden_states)
            query, key, value = (x.unflatten(-1, (self.heads, -1)) for x in projected)
        return query, key, value

    # What changes the layers or their weights from outside leaves the stack behind.

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, value)
        if isinstance(value, nn.Module) and "qkv" in vars(self):
            self.qkv.clear()

    def _apply(self, fn: Callable, recurse: bool = True) -> "SelfAttention":
        self.qkv.clear()
        return super()._apply(fn, recurse)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.processor(self, hidden_states)


class FeedForward(nn.Module):
    """Two linear layers with a tanh-approximated GELU between, as in DiT."""

    def __init__(self, dim: int, mlp_ratio: float):
        super().__init__()
        self.linear_1 = nn.Linear(dim, int(dim * mlp_ratio))
        self.linear_2 = nn.Linear(int(dim * mlp_ratio), dim)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.linear_2(F.gelu(self.linear_1(hidden_states), approximate="tanh"))


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
        self.attn = SelfAttention(dim, heads) if attn is None else attn
        self.ff = FeedForward(dim, mlp_ratio)
        self.adaln = nn.Linear(dim, 6 * dim)

    def forward(
        self,
        hidden_states: torch.Tensor,
        conditioning: torch.Tensor,
        modulation: torch.Tensor | None = None,
        weights: BlockWeights | None = None,
    ) -> torch.Tensor:
        """hidden_states (B, N, D) -> the same shape.

        Args:
            hidden_states: tokens.
            conditioning: (B, D), after its SiLU.
            modulation: what `modulation` makes of the conditioning, (B, 6, 1, D), if it is known already.
            weights: the weights of this block, if its modules may be left out (`plain_block`).
        """
        if modulation is None:
            modulation = self.modulation(conditioning)
        if weights is not None:
            return plain_block(hidden_states, modulation, weights)
        return self.modulated(hidden_states, modulation)

    def modulation(self, conditioning: torch.Tensor) -> torch.Tensor:
        """Shift, scale and gate of the attention, then of the feed-forward: (B, D) -> (B, 6, 1, D)."""
        return _from_one(self.adaln(conditioning).unflatten(-1, (6, 1, -1)))

    def modulated(self, hidden_states: torch.Tensor, modulation: torch.Tensor, *attn_args) -> torch.Tensor:
        """The block on tokens (B, N, D) under a modulation (B, 6, 1, D)."""
        shift_attn, scale_attn, gate_attn, shift_ff, scale_ff, gate_ff = modulation.unbind(1)
        attended = self.attn(norm_modulate(hidden_states, shift_attn, scale_attn), *attn_args)
        hidden_states = torch.addcmul(hidden_states, gate_attn, attended)
        fed = self.ff(norm_modulate(hidden_states, shift_ff, scale_ff))
        return torch.addcmul(hidden_states, gate_ff, fed)


class FinalLayer(nn.Module):
    """The last layer of DiT: modulated LayerNorm and a linear map to `out_features`.

    Models call its parts. So it must not have "Norm" in its name: a last module that has is sharded by accelerate as
    one that is called whole.
    """

    def __init__(self, dim: int, out_features: int):
        super().__init__()
        self.adaln = nn.Linear(dim, 2 * dim)
        self.proj_out = nn.Linear(dim, out_features)

    def modulation(self, conditioning: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Shift and scale, each (B, D)."""
        shift, scale = self.adaln(conditioning).chunk(2, dim=-1)
        return shift, 1 + scale

    def forward(self, hidden_states: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """hidden_states (..., D) with shift and scale that broadcast to it -> (..., out_features)."""
        return self.proj_out(norm_modulate(hidden_states, shift, scale))


def residual_stream(tokens: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Tokens in the dtype that blocks add to, where autocast leaves a choice: outside, it is that of the weights."""
    device = tokens.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return tokens.to(dtype) if autocast else tokens


def _from_one(modulation: torch.Tensor) -> torch.Tensor:
    """adaLN gives its scales relative to one: add it, in place, to (..., 6, 1, D)."""
    modulation[..., 1::3, :, :] += 1
    return modulation


class ModulationStack(LinearStack):
    """adaLN of all blocks of a model as one matrix product, and what else can be known of blocks before they run."""

    def __init__(self):
        super().__init__()
        self._state: list = []
        self._weights: list[BlockWeights | None] = []

    def clear(self) -> None:
        """Forget all that is known of the blocks."""
        super().clear()
        self._state, self._weights = [], []

    def prepare(self, blocks: nn.ModuleList, like: torch.Tensor) -> None:
        """Refresh the stacks of blocks, this one and those of their attention, for inputs `like` this."""
        if self._state_of(blocks, like) == self._state:
            return
        for block in blocks:
            block.attn.stack_projections(like)
        self.refresh([block.adaln for block in blocks], like)
        self._weights = [BlockWeights.of(block, like) if type(block) is DiTBlock else None for block in blocks]
        self._state = self._state_of(blocks, like)

    def _state_of(self, blocks: nn.ModuleList, like: torch.Tensor) -> list:
        # `_modules`, because an attribute of a module that is a module takes thrice the time to look up
        attentions = [block._modules["attn"] for block in blocks]
        feeds = [block._modules["ff"] for block in blocks]
        layers = [block._modules["adaln"] for block in blocks]
        layers += [attn._modules[name] for attn in attentions for name in ("to_q", "to_k", "to_v")]
        layers += [attn._modules["to_out"]._modules["0"] for attn in attentions]
        layers += [feed._modules[name] for feed in feeds for name in ("linear_1", "linear_2")]
        return [
            like.dtype,
            like.device,
            is_torch_as_it_is(),
            [(attn.fused_projections, attn.qkv.weight is None) for attn in attentions],
            [(attn.processor, attn.processor._attention_backend) for attn in attentions],
            [extras_of(module) for module in (*attentions, *feeds)],
            *state_of(layers),
        ]

    def prepared(self, blocks: nn.ModuleList, conditioning: torch.Tensor) -> list[tuple]:
        """What every block is told beside its input: its modulation (B, 6, 1, D) and weights, or nothing.

        Nothing in training: the gradients of a block's weights are to be ready with that block.
        """
        is_eager = not torch.compiler.is_compiling()
        if is_eager and not torch.is_grad_enabled():
            self.prepare(blocks, conditioning)
        if not self.is_ready:
            return [()] * len(blocks)
        modulations = _from_one(self(conditioning).unflatten(-1, (len(blocks), 6, 1, -1))).unbind(1)
        if is_eager and blocks[0]._compiled_call_impl is None and type(blocks[0]) is DiTBlock:
            return list(zip(modulations, self._weights))
        return [(modulation,) for modulation in modulations]


class StackedBlocksMixin:
    """A net with `transformer_blocks` and their `ModulationStack`, `adaln`."""

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        self.adaln.clear()  # a net that is moved off a device must leave nothing there
        return super()._apply(fn, recurse)


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

    def forward(self, timestep: torch.Tensor) -> torch.Tensor:
        """timestep (B,) -> (B, D)."""
        return self.mlp(self.frequencies(timestep).to(self.mlp.linear_1.weight.dtype))


class LabelEmbedder(nn.Embedding):
    """Class labels, with one more entry, index `num_classes`, for "no class": what guidance needs."""

    def __init__(self, num_classes: int, dim: int):
        super().__init__(num_classes + 1, dim)


def sincos_positions(height: int, width: int, dim: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Fixed 2-D sine-cosine positions of DiT for a grid of tokens of any shape: (height * width, dim).

    Computed once for a grid, not at every step. Positions are token indices, not rescaled to the training size: a
    wider image has more positions, equally spaced.
    """
    compute = _sincos_positions if torch.compiler.is_compiling() else _kept_sincos_positions
    return compute(height, width, dim, device, dtype)


def _sincos_positions(height: int, width: int, dim: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    with torch.inference_mode(False):  # what is kept must also serve a later training step
        rows = torch.arange(height, device=device, dtype=torch.float32)
        columns = torch.arange(width, device=device, dtype=torch.float32)
        grid = torch.stack(torch.meshgrid(columns, rows, indexing="xy"))  # the column comes first, as in DiT
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
            nn.init.normal_(child.weight, std=0.02)
    for child in module.modules():
        if isinstance(child, TimestepEmbedding):
            nn.init.normal_(child.linear_1.weight, std=0.02)
            nn.init.normal_(child.linear_2.weight, std=0.02)
        elif isinstance(child, (DiTBlock, FinalLayer)):
            nn.init.zeros_(child.adaln.weight)
            nn.init.zeros_(child.adaln.bias)


def check_conditioning(
    batch_size: int,
    timestep: torch.Tensor | float | int,
    class_labels: torch.Tensor | None,
    num_classes: int | None,
    device: torch.device,
) -> torch.Tensor:
    """Validate what conditions a model and return the timestep as a (B,) tensor.

    Raises:
        ValueError: the timestep is neither a scalar nor (B,); labels are given to an unconditional model, missing for
            a conditional one, of a wrong shape or dtype, or outside 0 ... num_classes.
    """
    timestep = torch.as_tensor(timestep, device=device)
    if timestep.ndim > 1 or (timestep.ndim == 1 and len(timestep) not in (1, batch_size)):
        raise ValueError(f"`timestep` must be a scalar or have shape ({batch_size},), got {tuple(timestep.shape)}.")
    if num_classes is None:
        if class_labels is not None:
            raise ValueError("`class_labels` were given to an unconditional model (num_classes is None).")
    elif class_labels is None:
        raise ValueError(
            f"`class_labels` are required by a model of {num_classes} classes; {num_classes} itself means no class."
        )
    else:
        if class_labels.shape != (batch_size,) or class_labels.dtype != torch.int64:
            raise ValueError(
                f"`class_labels` must be int64 of shape ({batch_size},), got {class_labels.dtype} of shape"
                f" {tuple(class_labels.shape)}."
            )
        if class_labels.device.type == "cpu" and not torch.compiler.is_compiling():
            # Elsewhere the embedding itself fails on a bad index, and reading the labels back would stall the queue.
            low, high = torch.aminmax(class_labels)
            if low < 0 or high > num_classes:
                raise ValueError(
                    f"`class_labels` must lie in 0 ... {num_classes} (no class), got {low.item()} to {high.item()}."
                )
    return timestep.expand(batch_size)
